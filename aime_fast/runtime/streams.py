"""Side streams: parts of an update that do not wait for each other run side by side on the GPU.

Kernels of a small model leave most of a GPU idle, and a captured update is a chain of thousands of them. Work that is given to a side
stream becomes a branch of the graph, and so does its backward pass, since autograd runs a node on the stream of its forward pass. Eager
updates have one stream: there the host is what they wait for.

The allocator gives freed memory of a stream to that stream again, whatever others still read. So what passes from one stream to another is
recorded on the reader, and nothing that a graph of autograd has saved may be freed before all streams have joined. Under autocast a
weight is cast once, on the stream of its first use: others that use it must have waited for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

_streams: dict[tuple[int, str], torch.cuda.Stream] = {}  # all that were ever made, by device and name: libraries keep memory for each
_forked: set[str] | None = None  # names of those in use; None where there is one stream


@contextlib.contextmanager
def side_streams() -> Iterator[None]:
    """Within it, `beside` uses streams of its own."""
    global _forked
    _forked = set()
    # Weights that several streams read have one node each that gathers their gradients; the engine synchronises it. Stays off.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    try:
        yield
        join(*_forked)
    finally:
        _forked = None


def has_side_streams() -> bool:
    """Whether `beside` uses streams of its own; not inside compiled code."""
    return _forked is not None and not torch.compiler.is_compiling()


def fork(*names: str | None) -> None:
    """These side streams wait for what the present stream was given so far; None is the present one."""
    for name in filter(None, names if has_side_streams() else ()):
        _forked.add(name)
        _stream(name).wait_stream(torch.cuda.current_stream())


def _stream(name: str) -> torch.cuda.Stream:
    """The side stream of that name on the present device. Made once: PyTorch hands out a small number of streams in turn."""
    key = torch.cuda.current_device(), name
    if key not in _streams:
        _streams[key] = torch.cuda.Stream()
    return _streams[key]


@contextlib.contextmanager
def on(name: str | None) -> Iterator[None]:
    """Within it, work goes to the side stream of that name, which was forked before; None: to the present stream."""
    if name is None or not has_side_streams():
        yield
        return
    with torch.cuda.stream(_stream(name)):
        yield


def join(*names: str | None) -> None:
    """The present stream waits for what these side streams were given so far; None is the present one."""
    for name in filter(None, names if has_side_streams() else ()):
        torch.cuda.current_stream().wait_stream(_stream(name))


def record(nested: Any, stream: torch.cuda.Stream | None = None) -> None:
    """The memory of these tensors is free again only when `stream`, by default the present one, has done what it was given so far."""
    if not has_side_streams():
        return
    stream = stream or torch.cuda.current_stream()
    for leaf in tree_leaves(nested):
        if isinstance(leaf, Tensor):
            leaf.record_stream(stream)


def beside(name: str, function: Callable[..., T], *arguments: Any, ahead: bool = False) -> Callable[[], T]:
    """Starts `function(*arguments)` on the side stream of that name; every tensor that others change or free is an argument.

    Args: ahead: not after all that the present stream was given, but after what it was given before the last `fork` of that name.

    Returns: a function that gives the results, for which the stream that calls it waits.
    """
    if not has_side_streams():
        results = function(*arguments)
        return lambda: results
    if not ahead:
        fork(name)
    record(arguments, _stream(name))
    with on(name):
        results = function(*arguments)

    def joined() -> T:
        join(name)
        record(results)
        return results

    return joined
