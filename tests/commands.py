"""The commands as a user types them, in this process or in one of their own, which costs five seconds of imports."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

from aime_fast.cli import run_command

ROOT = Path(__file__).parents[1]


def command(name: str, *arguments: str, cwd: Path, stdout: io.StringIO | None = None) -> subprocess.CompletedProcess:
    """`python -m aime_fast.NAME ARGUMENTS` in folder `cwd`, called in this process: exit status, output and errors."""
    main = importlib.import_module(f"aime_fast.{name}").main
    out, err, status = stdout or io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(lambda: main(list(arguments)))
    except SystemExit as leaving:
        status = leaving.code or 0
    finally:
        for number, handler in handlers.items():  # a command leaves them as they are at the end of a process
            signal.signal(number, handler)
    return subprocess.CompletedProcess([name, *arguments], status, out.getvalue(), err.getvalue())


def process(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = [sys.executable, "-m", f"aime_fast.{name}", *arguments]
    return subprocess.run(line, cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=200, check=False)
