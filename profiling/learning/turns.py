"""Processes that take turns on one machine: one runs, the others are stopped, so that a slow hour of the machine hits all of them.

The turns are those of the kernel's job control, SIGSTOP and SIGCONT: the programs need no hooks. A turn lasts for so many processor
seconds, of all threads of the process and of its children, as /proc tells them; Linux only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

POLL = 0.2  # seconds between looks at the running process
PATIENCE = 20  # a turn ends after so many times its length in seconds of the clock, as where a process waits


def processor_seconds(pid: int) -> float:
    """Processor seconds, user and system, of a process with all its threads, of its live children and of those that it has waited for.

    Raises ProcessLookupError once the process is gone.
    """
    fields = _stat(pid)
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime
    for child in _children(pid):
        with suppress(ProcessLookupError):
            own += processor_seconds(child)
    return own


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat after the name, which may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        raise ProcessLookupError(f"process {pid} is gone") from None


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def take_turns(commands: Mapping[str, Sequence[str]], folder: Path, turn: float, environment: Mapping[str, str]) -> None:
    """Run commands to their ends, in turns of `turn` processor seconds; output goes to `folder`/<name>.log.

    Args: commands by name, as for `subprocess.Popen`; environment: variables beside those of this process.
    Raises RuntimeError, after all others are ended, where one fails; it names the log and cites its last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen] = {}
    try:
        for name, command in commands.items():
            with open(folder / f"{name}.log", "wb") as log:
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | environment,
                    start_new_session=True,
                )  # fmt: skip
            _signal(running[name], signal.SIGSTOP)
        while running:
            for name, process in list(running.items()):
                _signal(process, signal.SIGCONT)
                _run_for(process, turn if len(running) > 1 else float("inf"))
                if process.poll() is None:
                    _signal(process, signal.SIGSTOP)
                    continue
                del running[name]
                if process.returncode:
                    log = folder / f"{name}.log"
                    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                    raise RuntimeError(f"{name} ended with status {process.returncode}: {last} (all of it: {log})")
    finally:
        for process in running.values():
            _signal(process, signal.SIGKILL)
            process.wait()


def _run_for(process: subprocess.Popen, seconds: float) -> None:
    """Returns when the process has used so many processor seconds more, or has ended."""
    with suppress(ProcessLookupError):
        until, late = processor_seconds(process.pid) + seconds, time.monotonic() + PATIENCE * seconds
        while process.poll() is None and processor_seconds(process.pid) < until and time.monotonic() < late:
            time.sleep(POLL)


def _signal(process: subprocess.Popen, signum: int) -> None:
    """To the process and to all that it started: they are its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def environment(threads: int) -> dict[str, str]:
    """Variables of a training process: libraries that read them start with as many threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of ours."""
    return [sys.executable, "-m", module, *arguments]
