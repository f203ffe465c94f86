"""Stopping a run by a signal, after its checkpoint is saved."""

from __future__ import annotations

import os
import signal
import threading


class TrainingInterrupted(Exception):
    """A signal ended the run after its checkpoint was saved. `status` is the exit status: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.status = 128 + signum


class StopSignals:
    """While entered, Ctrl-C and SIGTERM set `signum` instead of ending the program; a second one ends it at once.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self):
        self.signum: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _stop(self, signum: int, _frame) -> None:
        self.signum = signal.Signals(signum)
        for s in self._previous:
            signal.signal(s, signal.SIG_DFL)
        # Written past Python's buffers: a handler may have interrupted a print.
        os.write(2, f"\n{self.signum.name}: finishing this step and saving; once more ends at once, without saving\n".encode())
