"""Provenance of a result: command line, commit, versions of packages. Imports only the standard library."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path


def command_line() -> str:
    """The command that started this process."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", module.name] if module is not None else ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the source tree that this package runs from, with `-dirty` where files differ.

    Outside a git tree it is what `AIME_COMMIT` says, for a copy without its git folder; else None.
    """
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
        found = done.stdout.strip() if done.returncode == 0 else ""
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return found or os.environ.get("AIME_COMMIT")
