"""Errors that a user can fix, each with the exit status of the command that it ends."""

from __future__ import annotations

import errno
import signal
import threading


class UserError(Exception):
    """The message names the value, the place and the remedy. A command prints it as one line and leaves with `status`."""

    status = 2


class ConfigError(UserError, ValueError):
    """Settings that contradict each other or the machine."""


class DataError(UserError, ValueError):
    """Data that cannot be recorded, read or used."""


class CheckpointError(UserError, ValueError):
    """No usable checkpoint where one is needed."""


class RankError(UserError, RuntimeError):
    """Another process of the same run has ended or does not answer."""


class NonFiniteError(UserError, FloatingPointError):
    """A tensor holds nan or infinity. The message names it, the step, how many elements, and where the first one is."""

    status = 3


class DamagedError(CheckpointError):
    """A checkpoint that is truncated or damaged, so that an older one may be taken; not one that merely cannot be read now."""


class Interrupted(KeyboardInterrupt):
    """A signal that ends a command: `status` is 128 plus its number. A KeyboardInterrupt, so that clean-up for Ctrl-C serves all."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.status = 128 + signum


def stop_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM and SIGHUP, less those that the process was started to ignore (nohup); none outside the main thread.

    Those that a command handles: Python lets only the main thread install handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [signum for signum in known if signal.getsignal(signum) is not signal.SIG_IGN]


_REMEDIES = {
    errno.ENOSPC: "free some space there, or name a folder on another disk",
    errno.EDQUOT: "free some of your quota, or name a folder on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "the file system is read-only, name a folder on another one",
    errno.EACCES: "change its permissions, or name another folder",
    errno.EPERM: "change its permissions, or name another folder",
    errno.ENOENT: "check the spelling of the path",
    errno.EEXIST: "a file lies where a folder is needed, move it away or name another folder",
    errno.ENOTDIR: "a part of the path is a file and not a folder, check the path",
    errno.EISDIR: "a folder lies where a file is needed, move it away",
    errno.ENOTEMPTY: "a folder lies where a file is needed, move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "symbolic links lead in a circle, name the file itself",
    errno.EIO: "the disk or the network reports a fault, check it; nothing was deleted",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def explain(error: OSError) -> str:
    """An error of the operating system as one line: the file, what is wrong, the remedy."""
    if error.errno is None:  # made by hand: its text is a message
        return (str(error).splitlines() or [type(error).__name__])[0]
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror}; {_REMEDIES.get(error.errno, 'check the disk and the path')}"
