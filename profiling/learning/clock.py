"""What training costs: processor seconds of this process, less what is paused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Processor seconds (`time.process_time`: user and system, all threads, not those of children) since it was made."""

    def __init__(self):
        self._began = time.process_time()
        self._excluded = 0.0

    @property
    def seconds(self) -> float:
        """So far."""
        return time.process_time() - self._began - self._excluded

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within it does not count."""
        began = time.process_time()
        try:
            yield
        finally:
            self._excluded += time.process_time() - began
