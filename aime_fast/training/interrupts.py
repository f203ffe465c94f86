"""Ending a run early, after its checkpoint is saved: by a signal, or because its output cannot be written any more."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

from aime_fast.errors import stop_signals

TWINS = 2.0  # seconds: launchers and terminals send a signal twice, to the process and to its group


class StopSignals:
    """While entered, Ctrl-C, SIGTERM and SIGHUP set `signum` instead of ending the program.

    A second Ctrl-C or SIGTERM, more than two seconds later, ends it at once. Signals that the process was started to ignore (nohup) are
    ignored further. Outside the main thread, where Python allows no handlers, only `request` stops.
    """

    def __init__(self):
        self.signum: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {signum: signal.signal(signum, self._stop) for signum in stop_signals()}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def request(self, signum: int) -> None:
        """Stop as after this signal. The first request counts."""
        if self.signum is None:
            self.signum, self._since = signal.Signals(signum), time.monotonic()

    def _stop(self, signum: int, _frame) -> None:
        if self.signum is None:
            self.request(signum)
            # Written past Python's buffers: a handler may have interrupted a print. A closed terminal takes nothing.
            with suppress(OSError):
                os.write(2, f"\n{self.signum.name}: finishing this step and saving; once more ends at once, without saving\n".encode())
        elif signum != getattr(signal, "SIGHUP", None) and time.monotonic() - self._since > TWINS:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
