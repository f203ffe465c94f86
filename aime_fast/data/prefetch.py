"""Results made ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """A thread that calls `make(first)`, `make(first + 1)`, ... and keeps `ahead` results ready."""

    def __init__(self, make: Callable[[int], T], first: int, ahead: int):
        self._queue: queue.Queue[T | BaseException] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        self._worker = threading.Thread(target=self._run, args=(make, first), name="prefetch", daemon=True)
        self._worker.start()

    def _run(self, make: Callable[[int], T], number: int) -> None:
        while not self._stopped.is_set():
            try:
                made: T | BaseException = make(number)
            except BaseException as error:
                made = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return
            number += 1

    def next(self) -> T:
        """The next result; raises what `make` raised."""
        made = self._queue.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def stop(self) -> None:
        """End the thread and wait until it has: a thread still copying while the interpreter leaves would crash it."""
        self._stopped.set()
        self._worker.join()
