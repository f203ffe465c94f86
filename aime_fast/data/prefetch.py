"""A thread that computes results ahead, and copies to a GPU on a separate stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from tensordict import TensorDict

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """A thread that calls `make(first)`, `make(first + 1)`, ... and keeps `ahead` results ready. Errors are results too.

    The thread computes alone. A second pool of OpenMP threads in the process would make it hold more threads than cores, and then
    the threads of the training step sleep at each barrier instead of spinning: every small operator takes twice as long.
    """

    def __init__(self, make: Callable[[int], T], first: int, ahead: int):
        self._queue: queue.Queue[T | BaseException] = queue.Queue(maxsize=ahead)
        self._stopped = threading.Event()
        torch.get_num_threads()  # the calling thread keeps its own number from here on
        self._worker = threading.Thread(target=self._run, args=(make, first), name="prefetch", daemon=True)
        self._worker.start()

    def _run(self, make: Callable[[int], T], number: int) -> None:
        torch.set_num_threads(1)  # of this thread, and of such as call torch for the first time after it
        while not self._stopped.is_set():
            try:
                result: T | BaseException = make(number)
            except BaseException as error:
                result = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(result, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(result, BaseException):
                return
            number += 1

    def next(self) -> T:
        """The next result; raises what `make` raised."""
        result = self._queue.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        """Stop the thread, wait for its end and drop the results that were not taken.

        The wait is needed: a thread that copies while the interpreter exits would crash it.
        """
        self._stopped.set()
        self._worker.join()
        self._queue.queue.clear()


class CopyStream:
    """Copies batches from pinned memory to a GPU on a separate stream. The host never waits.

    `send` runs in the thread that made the batch, `receive` in the one that uses it. If one thread may send while another captures a
    CUDA graph, capture with `capture_error_mode="thread_local"`.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: TensorDict) -> tuple[TensorDict, torch.cuda.Event]:
        """Start the copy of a batch in pinned memory; returns the copy and an event that marks its end.

        The caller may drop the batch at once: the caching host allocator reuses a block only after the non-blocking copies from it.
        """
        with torch.cuda.stream(self._stream):
            device = self._stream.device
            copies = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            return TensorDict(copies, batch_size=batch.batch_size, device=device), self._stream.record_event()

    def receive(self, sent: tuple[TensorDict, torch.cuda.Event]) -> TensorDict:
        """The copy, for use on the current stream, which waits for it on the device."""
        batch, copied = sent
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_event(copied)
        for value in batch.values():
            value.record_stream(current)  # allocated on the copy stream, which must not reuse it before `current` is done
        return batch
