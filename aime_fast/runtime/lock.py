"""One process a folder: an advisory lock that the kernel releases however its holder ends."""

from __future__ import annotations

import os
import platform
import weakref
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from aime_fast.errors import ConfigError
from aime_fast.runtime.files import naming, open_locked

NAME = "run.lock"
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """Holds `folder`, made if missing, until `release`, the end of the object or of the process. `run.lock` in it names the holder.

    Args:
        folder: to hold.
        report: called with a message where the file system has no locks; the folder is then used without one.

    Raises:
        ConfigError: another process, or another object of this one, holds it; nothing in the folder was changed.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, report=print):
        self.folder = Path(folder)
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None
        try:
            self._file = self._hold(self.folder / NAME, report)
        except OSError:  # as of a full disk
            if self._made:
                with suppress(OSError):
                    (self.folder / NAME).unlink()
                self._remove_made()
            raise
        _held.add(self)

    def release(self, discard: bool = False) -> None:
        """Give the folder back; `discard` removes it and its lock again if this object made it and nothing else is in it."""
        if self._file is None:
            return
        file, self._file = self._file, None
        if discard and self._made and os.listdir(self.folder) == [NAME]:
            (self.folder / NAME).unlink()
            self._remove_made()
        file.close()

    def _hold(self, path: Path, report) -> BinaryIO:
        try:
            file, locked = open_locked(path, wait=False)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
            raise ConfigError(
                f"{self.folder}: another run uses this folder ({holder or 'its process is not known'}); wait for its end, or name "
                "another folder with --run-dir"
            ) from None
        if not locked:
            report(f"{self.folder}: this file system has no locks; make sure that no other run uses the folder")
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            file.flush()
        return file

    def _remove_made(self) -> None:
        with suppress(OSError):
            for path in self._made:
                path.rmdir()


def _let_go() -> None:
    """In a forked worker, which may outlive a killed parent: it must not hold the parent's folder."""
    for lock in _held:
        if lock._file is not None:
            lock._file.close()
            lock._file = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
