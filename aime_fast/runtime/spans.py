"""Named ranges of time, so that a profile has pillars and not only operators.

Names are `part: detail`, where `part` is the package of a pillar ("encoder_decoder: encoder") or "step" ("step: forward").
`profiling.trace` adds up the time of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.profiler import record_function

_nvtx = False
_open: list[str] | None = None  # names of the ranges around the present operator, outermost first, for who asked with `open_spans`


def use_nvtx(on: bool) -> None:
    """Whether spans are NVTX ranges too, for Nsight Systems. Off at first.

    Raises:
        RuntimeError: `on` without a CUDA device, where NVTX has nothing to talk to.
    """
    global _nvtx
    if on and not torch.cuda.is_available():
        raise RuntimeError("NVTX ranges need a CUDA device, and PyTorch finds none; leave --nvtx out")
    _nvtx = on


def span(name: str) -> contextlib.AbstractContextManager:
    """A range of that name in torch.profiler and, after `use_nvtx(True)`, in NVTX.

    It does nothing without a recorder, and in compiled code, where operators of several ranges become one kernel.

    Example:
        >>> with span("encoder_decoder: encoder"):
        ...     posterior = encoder(frames, context)
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if _open is not None:
        return _listed(_open, name)
    if _nvtx:
        return _named_twice(name)
    return record_function(name) if torch.autograd._profiler_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def open_spans() -> Iterator[list[str]]:
    """Within it, the list has the names of the ranges that are open at the moment, outermost first."""
    global _open
    _open = []
    try:
        yield _open
    finally:
        _open = None


@contextlib.contextmanager
def _listed(names: list[str], name: str) -> Iterator[None]:
    names.append(name)
    try:
        yield
    finally:
        names.pop()


@contextlib.contextmanager
def _named_twice(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        torch.cuda.nvtx.range_pop()
