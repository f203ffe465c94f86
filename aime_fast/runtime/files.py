"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None

TEMPORARY = ".tmp"  # added to the name of a file while it is written
DAMAGED = ".damaged"  # added to the name of a file that was moved aside


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write; what is written takes the place of `path` when the block ends, and nothing does where it raises.

    A kill at any moment leaves the old file or the new one, and at most a `.tmp` that the next write of the same file replaces. Where two
    processes write the same file, the second waits for the first. Another program may write the file too, under its `name`.
    Raises OSError, with the name of the file, where the disk is full, read-only or the like.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    with naming(path), _open_alone(temporary) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    _sync_folder(path.parent)


def _open_alone(path: Path) -> BinaryIO:
    """An empty file that no other process writes; waits for one that does, or one would rename what the other has not finished."""
    while True:
        file = open(path, "ab")  # noqa: SIM115 (closed by the caller); not emptied before the lock is held
        try:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    file.truncate(0)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()  # the process before has renamed or removed it


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
