"""Files that HDF5 writes under a temporary name first, and are checked before they get their own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path

from aime_fast.errors import DataError, explain


def writable_target(path: str | Path) -> Path:
    """The file that writing to `path` replaces, with symbolic links followed.

    Raises DataError unless it is a regular file or does not exist: a device, a pipe or a folder is never replaced.
    """
    try:
        target = Path(path).resolve()
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except (OSError, RuntimeError) as error:  # Python 3.12 and older raise RuntimeError for links in a circle
        error = error if isinstance(error, OSError) else OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        raise DataError(f"{path}: cannot be written ({explain(error)})") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise DataError(f"{path}: this is {kind}, expected the name of a file to write; name another file")
    return target


class PartFile:
    """The file object through which HDF5 writes `target`, under a temporary name beside it until `finish`.

    HDF5 loses the errors of writes that it makes when a dataset or a file is closed, and can crash after them. So this object reports
    every write as done, keeps the first error in `error`, and the caller asks for it: `check`.

    A lock marks the part as in use. Parts of the same target that dead processes left are deleted first.

    Args:
        target: the final name; its folder is created.
    Attributes:
        path: the temporary name. error: of the first write that failed, or None.
    Raises:
        DataError: the file cannot be created.
    """

    def __init__(self, target: Path):
        self.target, self.error = target, None
        self.path = target.with_name(f".{target.name}.part-{os.getpid()}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale_parts(target)
            self._file = open(self.path, "w+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({explain(error)})") from error
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def check(self) -> None:
        """Raise DataError if a write has failed."""
        if self.error is not None:
            raise DataError(f"{self.target}: cannot be written ({explain(self.error)}); no file was left") from self.error

    def finish(self) -> None:
        """Wait until the file is on the disk and give it its final name. Raises DataError if either fails, or the target is no file."""
        self.flush()
        self.check()
        try:
            os.fsync(self._file.fileno())
            if writable_target(self.target) != self.target:
                raise DataError(f"{self.target}: has become a symbolic link while it was being written; name the file itself")
            os.replace(self.path, self.target)
        except OSError as error:
            self.error = error
            self.check()
        self._file.close()

    def discard(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data)
        try:
            self._put(view)
        except OSError as error:
            self.error = self.error or error
        return len(view)

    def _put(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def flush(self) -> None:
        """Nothing is buffered here."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: bytearray | memoryview) -> int:
        return self._file.readinto(buffer)


def _remove_stale_parts(target: Path) -> None:
    """Delete the parts of `target` that belong to no running process."""
    prefix = f".{target.name}.part-"
    for path in target.parent.iterdir():
        if not path.name.startswith(prefix) or _is_running(path.name.removeprefix(prefix)):
            continue
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if a process on another machine writes it
            path.unlink()


def _is_running(pid: str) -> bool:
    """Whether another process of this machine has this number; True for what is not a number."""
    if not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return int(pid) != os.getpid()
