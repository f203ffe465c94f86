"""Which implementation an operation runs: its reference in plain PyTorch, or its Triton kernel.

The environment variable `AIME_KERNELS` (or `select_kernels`, behind `--kernels`) chooses:

* `auto`: Triton for CUDA tensors, the reference for all others. This is the default.
* `reference`: the reference everywhere.
* `triton`: Triton everywhere; on a CPU it needs Triton's interpreter, `TRITON_INTERPRET=1`, which is slow and made for tests.

Triton is imported when the first kernel runs, so machines without it can run the references.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "triton")
ARCHITECTURES = (80, 90, 100)  # compute capabilities with committed configurations: A100, H100/H200, B200

# Triton reads the variable when it is first imported; a later change has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

_selected = "auto"
_pinned: int | None = None


class Launch(NamedTuple):
    """A committed configuration of a kernel: its tile sizes (constexpr arguments) and its shape on the machine."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def arguments(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Specialisation(NamedTuple):
    """A kernel as it is compiled for one set of argument types, for compilation ahead of time."""

    name: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, str]  # argument -> "*fp32", "i32", ...; the types of constexprs are ignored
    constexprs: dict[str, Any]  # besides those of the launch
    launch: Launch


class KernelError(ValueError):
    """The choice of kernels is unknown, or this machine cannot run it."""


def select_kernels(choice: str | None = None) -> None:
    """Choose the implementation of every operation from now on; call it before anything is compiled.

    Args:
        choice: one of `CHOICES`; left out, the value of `AIME_KERNELS`, or "auto".

    Raises:
        KernelError: unknown choice, or "triton" where Triton cannot run.
    """
    global _selected
    source = "kernels"
    if choice is None:
        choice, source = os.environ.get("AIME_KERNELS") or "auto", "AIME_KERNELS"
    if choice not in CHOICES:
        raise KernelError(f"{source}: {choice!r} is unknown; choose one of {', '.join(CHOICES)}")
    if choice == "triton":
        if not HAS_TRITON:
            raise KernelError(f"{source}: 'triton' was asked for, but Triton is not installed; pip install triton, or choose 'auto'")
        if not torch.cuda.is_available() and not INTERPRETED:
            raise KernelError(
                f"{source}: 'triton' needs a CUDA device, and none was found; choose 'auto', "
                "or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter (slow, made for tests)"
            )
    _selected = choice


def selected_kernels() -> str:
    """The choice in force: "auto", "reference" or "triton"."""
    return _selected


def use_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs its Triton kernel."""
    return kernels_on(x.device) != "reference"


def kernels_on(device: torch.device) -> str:
    """What operations on this device run, for the records of a run: "triton", "triton, interpreted" or "reference"."""
    if device.type == "cuda":
        return "triton" if _selected != "reference" and HAS_TRITON else "reference"
    return "triton, interpreted" if _selected == "triton" and INTERPRETED else "reference"


def architecture(device: torch.device) -> int:
    """The architecture whose committed configurations serve this device: the newest that is not newer."""
    if _pinned is not None:
        return _pinned
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


@contextlib.contextmanager
def pin_architecture(arch: int) -> Iterator[None]:
    """Inside, every launch takes the configurations of `arch`, so that tests can run all of them on one machine."""
    global _pinned
    before, _pinned = _pinned, arch
    try:
        yield
    finally:
        _pinned = before


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


try:
    select_kernels()
except KernelError as error:
    warnings.warn(f"{error}. Until then the choice is 'auto'.", stacklevel=2)
