"""Commands of aime_fast as processes: forked from this one, which has imported everything, or started anew.

A forked command needs no imports and runs its `main` a second earlier than a new one, so that kills at random instants hit the work. This
process must have one thread, and must not have computed gradients: neither survives a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import itertools
import os
import resource
import select
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from aime_fast.cli import run_command
from profiling.faults.outcome import Problem
from profiling.machine import ROOT

LIMIT = 90.0  # seconds after which a command hangs
ORPHANS = 30.0  # seconds until workers that a kill of their parent met while they started have noticed it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # wait while a process is forked: neither it nor its parent misses one
_numbers = itertools.count()
_running: set[Command] = set()


class Command:
    """`python -m MODULE ARGUMENTS` in a session of its own.

    Args:
        module: as `aime_fast.train`. arguments: its words.
        cwd: where it runs; its output and its temporary files are in folders beside it.
        new: as a new Python process, not forked.
        file_size: limit on the size of files, bytes.
        tmp: TMPDIR.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], cwd: Path, *, new: bool = False, file_size: int | None = None, tmp: Path | None = None
    ):
        self.words = shlex.join(["python", "-m", module, *map(str, arguments)])
        self.tmp, logs = tmp or cwd / "tmp", cwd / "logs"
        with contextlib.suppress(OSError):  # on a full disk
            self.tmp.mkdir(exist_ok=True)
        logs.mkdir(exist_ok=True)
        self._log = logs / f"{os.getpid()}-{next(_numbers)}"
        self.status: int | None = None
        self.began = time.monotonic()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _become(module, list(map(str, arguments)), cwd, self._log, self.tmp, new, file_size)
            finally:
                os._exit(70)
        _running.add(self)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._read("out")

    @property
    def err(self) -> str:
        return self._read("err")

    def wait(self, seconds: float = LIMIT) -> int | None:
        """Its status (minus a signal's number, if one ended it), or None where it still runs after `seconds`."""
        until = time.monotonic() + seconds
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                _running.discard(self)
            elif time.monotonic() >= until:
                return None
            else:
                time.sleep(0.004)
        return self.status

    def wait_for(self, text: str, seconds: float = LIMIT) -> bool:
        """Wait until it has printed `text`; False where it ended, or time ran out, before."""
        until = time.monotonic() + seconds
        while text not in self.out:
            if self.wait(0.01) is not None or time.monotonic() >= until:
                return text in self.out
        return True

    def signal(self, signum: int, group: bool = False) -> None:
        """Send a signal to it, or to all of its group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signum)

    def family(self) -> list[int]:
        """Living processes of its session but itself."""
        return [pid for pid in _session(self.pid) if pid != self.pid]

    def check(self, *allowed: int, seconds: float = LIMIT) -> int:
        """Wait for its end and return its status. Raises Problem unless that is allowed and its output is as it should be."""
        status = self.wait(max(0.0, seconds))
        if status is None:
            self.kill()
            raise Problem("lost", f"hung: not done after {time.monotonic() - self.began:.0f} s; {self.last_line()}")
        errors = list(self.tmp.glob("aime_fast_error_*"))
        if errors or "Traceback (most recent call last)" in self.err:
            text = errors[0].read_text() if errors else self.err
            for path in errors:
                path.unlink()
            raise Problem("traceback", f"status {status}; {' | '.join(text.strip().splitlines()[-4:])}")
        if status not in allowed:
            crashed = status < 0 or status in (1, 70)
            raise Problem("traceback" if crashed else "lost", f"status {status}, expected {allowed}; {self.last_line()}")
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        if status in (2, 3) and len(lines) != 1:
            raise Problem("lost", f"status {status} with {len(lines)} lines 'error: ...'; {self.last_line()}")
        until = time.monotonic() + ORPHANS
        while self.family():
            if time.monotonic() > until:
                left = self.family()
                self.kill()
                raise Problem("lost", f"processes {left} outlive the command")
            time.sleep(0.01)
        return status

    def last_line(self) -> str:
        lines = [line for line in (self.err or self.out).strip().splitlines() if line.strip()]
        return lines[-1].strip() if lines else "no output"

    def kill(self) -> None:
        """End it and all of its session."""
        for pid in {self.pid, *self.family()} if self.status is None else self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(10)

    def _read(self, stream: str) -> str:
        with contextlib.suppress(OSError):
            return self._log.with_suffix(f".{stream}").read_text(encoding="utf-8", errors="replace")
        return ""


def end_all() -> None:
    """End every command that still runs."""
    for command in list(_running):
        command.kill()


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state not in "ZX":
                    found.append(int(entry.name))
    return found


def _default_signals() -> None:
    """In a forked child: no handler of the parent's, and no signal waits any more."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _become(module: str, arguments: list[str], cwd: Path, log: Path, tmp: Path, new: bool, file_size: int | None) -> None:
    """In a forked child: be that command until its end."""
    _default_signals()  # as `python -m aime_fast.*` has them while it imports itself
    os.setsid()
    os.chdir(cwd)
    for descriptor, place in ((0, Path(os.devnull)), (1, log.with_suffix(".out")), (2, log.with_suffix(".err"))):
        opened = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ |= {"TMPDIR": str(tmp), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if new:
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    tempfile.tempdir = None
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 (open until the end)
    sys.argv = [module, *arguments]
    status: object = 0
    try:
        run_command(importlib.import_module(module).main)
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # these two as at the end of an interpreter
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else 1)


def isolated(function: Callable[[int], str], numbers: Sequence[int], seconds: float = 20.0) -> Iterator[tuple[int, str]]:
    """`(number, function(number))` for each number, made in a child process: a crash or a hang costs one number, and is its answer."""
    left = list(numbers)
    while left:
        reading, writing = os.pipe()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = os.fork()
        if pid == 0:
            try:
                _default_signals()
                os.setsid()
                os.close(reading)
                with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                    for number in left:
                        os.write(writing, (function(number).replace("\n", " | ")[:2000] + "\n").encode())
            finally:
                os._exit(0)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(writing)
            with open(reading, "rb", buffering=0) as pipe:
                pending = b""
                while left:
                    ready = select.select([pipe], [], [], seconds)[0]
                    data = pipe.read(65536) if ready else b""
                    if not data:
                        break
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        yield left.pop(0), line.decode()
        finally:  # also where nobody asks for more answers; one that ends by itself keeps its status
            os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if left:
            yield left.pop(0), f"traceback hung for {seconds:.0f} s" if not ready else f"traceback the process ended with status {status}"
