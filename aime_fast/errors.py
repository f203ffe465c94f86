"""Errors that a user can fix, each with the exit status of the command that it ends."""

from __future__ import annotations


class UserError(Exception):
    """The message names the value, the place and the remedy. A command prints it as one line and leaves with `status`."""

    status = 2


class ConfigError(UserError, ValueError):
    """Settings that contradict each other or the machine."""


class DataError(UserError, ValueError):
    """Data that cannot be recorded, read or used."""


class CheckpointError(UserError, ValueError):
    """No usable checkpoint where one is needed."""


class NonFiniteError(UserError, FloatingPointError):
    """A tensor holds nan or infinity. The message names it, the step, how many elements, and where the first one is."""

    status = 3
