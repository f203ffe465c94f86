"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # added to the name of a file while it is written
DAMAGED = ".damaged"  # added to the name of a file that was moved aside
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # a file system without locks, as some network ones are


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write; what is written takes the place of `path` when the block ends, and nothing does where it raises.

    A kill at any moment leaves the old file or the new one, and at most a `.tmp` that the next write of the same file replaces. Where two
    processes write the same file, the second says so and waits for the first. Another program may write the file too, under its `name`; it
    has to inherit the descriptor, which holds the lock.
    Raises OSError, with the name of the file, where the disk is full, read-only or the like.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    with naming(path), open_locked(temporary)[0] as file:
        file.truncate(0)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                if _has_name(file, temporary):
                    temporary.unlink()
            raise
    _sync_folder(path.parent)


def open_locked(path: Path, wait: bool = True) -> tuple[BinaryIO, bool]:
    """A file to write that no other process holds, made if missing and not emptied; and whether it has a lock: not every file system can.

    The lock goes with the descriptor: with the last process that has it. Raises BlockingIOError where another holds it and not `wait`.
    """
    while True:
        file = open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666))  # noqa: SIM115 (the caller closes it)
        try:
            locked = _lock(file, path, wait)
            if _has_name(file, path):
                return file, locked
        except BaseException:
            file.close()
            raise
        file.close()  # its last holder renamed or removed it between the two calls


def _lock(file: BinaryIO, path: Path, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        if not wait or error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        print(f"{path}: another process writes this file, waiting for it", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


def _has_name(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def move_aside(path: Path) -> Path:
    """Rename a damaged file, or whatever lies in a file's place, to `<name>.damaged` or `<name>.damaged2`, ...; returns the new path."""
    number, aside = 1, path.with_name(path.name + DAMAGED)
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}{DAMAGED}{number}")
    path.rename(aside)
    return aside


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError that names no file, as those of `write` are, the name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)
