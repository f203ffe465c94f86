"""Results made ahead by a thread, and copies to a GPU on a stream of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from tensordict import TensorDict

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
        """End the thread and wait until it has: a thread still copying while the interpreter leaves would crash it.

        The results that nobody took are let go.
        """
        self._stopped.set()
        self._worker.join()
        self._queue.queue.clear()


class CopyStream:
    """Copies from pinned memory to a GPU beside the stream that computes. The host waits for nothing.

    `send` runs in the thread that made the batch, `receive` in the one that uses it. A thread that sends while another captures
    a CUDA graph makes calls that only `capture_error_mode="thread_local"` permits.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: TensorDict) -> tuple[TensorDict, torch.cuda.Event]:
        """Start the copies of a batch in pinned memory; the batch may be dropped at once.

        Its memory is not reused too early: the caching host allocator holds a block back until the non-blocking copies from it
        have been made.
        """
        with torch.cuda.stream(self._stream):
            device = self._stream.device
            copies = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            return TensorDict(copies, batch_size=batch.batch_size, device=device), self._stream.record_event()

    def receive(self, sent: tuple[TensorDict, torch.cuda.Event]) -> TensorDict:
        """The copy, for use on the stream that is current now, which waits for it on the device."""
        batch, copied = sent
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(copied)
        for value in batch.values():
            value.record_stream(current)  # allocated on the copy stream, which must not reuse it before `current` is through
        return batch
