"""A function of device tensors captured as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from aime_fast.runtime.streams import side_streams

WARM_UP = 3  # ordinary calls before the first capture: they compile, choose algorithms and allocate, which a capture must not


class Captured:
    """Calls `function`, whose inputs never change shape, by replaying a CUDA graph of it.

    The first calls (`WARM_UP`, or one where memory is shared) run the function itself, on a side stream; the next one captures it; from
    then on a call copies its inputs to where the graph reads them and launches the graph. Every call does the function's work exactly once.
    Outputs are the same tensors in every replay: read or copy them before the next call. Random numbers of the default generator advance as
    without a graph.

    Args:
        function: takes nested tuples, lists and dictionaries of tensors, returns such; waits for nothing; changes tensors in place only.
        device: CUDA.
        memory_of: another one, never replayed at the same time, whose memory pool this one shares; outputs of either are valid until
            the next call of either.

    Raises:
        ValueError: a later call has inputs of another structure, shape or dtype.
    """

    def __init__(self, function: Callable, device: torch.device, memory_of: Captured | None = None):
        self.function, self.device = function, device
        self.calls, self._warm_up = 0, 1 if memory_of else WARM_UP
        # Memory is shared by those who share pool and stream: the allocator keeps the blocks of each stream apart.
        self._pool = memory_of._pool if memory_of else torch.cuda.graph_pool_handle()
        self._stream = memory_of._stream if memory_of else torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()
        self._inputs: list[Tensor] = []
        self._structure: pytree.TreeSpec | None = None
        self._outputs: Any = None

    def __call__(self, *arguments: Any) -> Any:
        self._fill(arguments)
        if self.calls < self._warm_up:
            outputs = self._run_on_side_stream()
            self.calls += 1
            return outputs
        if self.calls == self._warm_up:
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"), side_streams():
                self._outputs = self.function(*pytree.tree_unflatten(self._inputs, self._structure))
        self.calls += 1
        self._graph.replay()
        return self._outputs

    def _fill(self, arguments: Any) -> None:
        """Copy the arguments into the buffers that the graph reads."""
        given, structure = pytree.tree_flatten(arguments)
        if self._structure is None:
            self._structure = structure
            self._inputs = [tensor.clone() for tensor in given]
            return
        if structure != self._structure:
            raise ValueError(f"captured step: the inputs have the structure {structure}, the graph was made for {self._structure}")
        for buffer, tensor in zip(self._inputs, given):
            if tensor.shape != buffer.shape or tensor.dtype != buffer.dtype:
                raise ValueError(
                    f"captured step: an input is {tensor.dtype} {tuple(tensor.shape)}, the graph was made for {buffer.dtype} "
                    f"{tuple(buffer.shape)}; use --compile off where shapes change"
                )
            buffer.copy_(tensor, non_blocking=True)

    def _run_on_side_stream(self) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), side_streams():
            outputs = self.function(*pytree.tree_unflatten(self._inputs, self._structure))
        current.wait_stream(self._stream)
        return outputs


class Graphs:
    """Captured functions by key, which share the memory of the first: outputs are valid until the next call of any."""

    def __init__(self, device: torch.device):
        self.device = device
        self.by_key: dict[Hashable, Captured] = {}
        self._first: Captured | None = None  # stays, whichever are dropped

    def of(self, key: Hashable, function: Callable) -> Captured:
        """The graph of that key, which is one of `function`."""
        if key not in self.by_key:
            self.by_key[key] = Captured(function, self.device, memory_of=self._first)
            self._first = self._first or self.by_key[key]
        return self.by_key[key]

    def keep(self, wanted: Callable[[Any], bool]) -> None:
        """Drop the graphs of all other keys."""
        self.by_key = {key: graph for key, graph in self.by_key.items() if wanted(key)}
