"""A case of `profiling.check`, and what the cases of all kernels share."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


def unchanged(function: Callable) -> Callable:
    """The default of `through`: the public function itself."""
    return function


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the check."""

    kernel: str
    name: str
    make: Callable[[torch.Generator], Inputs]  # on the CPU
    run: Callable[..., Outputs]  # run(inputs, through): `through` wraps the public function, in torch.compile for instance
    eager: Callable[[Inputs], Outputs]
    exact: Callable[[Inputs, Outputs], Outputs]
    dtype: torch.dtype = torch.float32  # in which the work is done; its eps counts where it is coarser than that of an output
    pinned: bool = False  # run with the configurations of every architecture, not only this machine's

    def inputs(self) -> Inputs:
        """The inputs, the same at every call."""
        return self.make(torch.Generator().manual_seed(zlib.crc32(f"{self.kernel}/{self.name}".encode())))


def to_double(value: Any) -> Any:
    """Float tensors to float64 on the CPU, inside lists and dictionaries too."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: to_double(item) for name, item in value.items()}
    return [to_double(item) for item in value] if isinstance(value, list) else value


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors to a device, inside lists and dictionaries too, with the strides they have."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def with_gradients(outputs: Outputs, leaves: Outputs, cotangents: Outputs) -> Outputs:
    """Outputs and, as "d NAME", the gradients of the leaves. A scalar cotangent is expanded, so the backward gets strides of 0."""
    named = [name for name in cotangents if outputs[name].requires_grad]
    sent = [cotangents[name].to(outputs[name].dtype).expand_as(outputs[name]) for name in named]
    found = torch.autograd.grad([outputs[name] for name in named], list(leaves.values()), sent, allow_unused=True)
    grads = {f"d {name}": torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), found)}
    return {name: value.detach() for name, value in outputs.items()} | grads
