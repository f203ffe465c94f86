"""Committed configurations and launchers of the Kumaraswamy kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import ARCHITECTURES, Launch, Specialisation, architecture, device_of
from kernels.kumaraswamy.reference import quadrature
from kernels.kumaraswamy.triton import sticks_backward_kernel, sticks_kernel

# STICKS, padding included, in a tile of either kernel. The nodes multiply the work on a stick, so with the exact KL the tile is small.
TILES = {
    arch: {None: Launch({"STICKS": 512}, 4, 1), "exact": Launch({"STICKS": 32}, 2, 1), "series10": Launch({"STICKS": 128}, 4, 1)}
    for arch in ARCHITECTURES
}


@functools.cache
def _nodes_on(device: torch.device) -> Tensor:
    """[2, 24] float32. The first call copies them to the device, so it must not be inside a capture of a CUDA graph."""
    return torch.stack(quadrature(torch.float64, "cpu")).to(device, torch.float32)


def _launch_for(arch: int, kl: str | None, components: int) -> Launch:
    """The committed configuration, with the tile for K components."""
    launch, padded = TILES[arch][kl], triton.next_power_of_2(components)
    return launch._replace(blocks={"KP": padded, "BLOCK_ROWS": max(1, launch.blocks["STICKS"] // padded)})


def _by_row(x: Tensor) -> Tensor:
    """[..., K-1] -> [N, K-1] with consecutive columns; without a copy if possible, since the model passes halves of a tensor."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _spread(x: Tensor | None, shape: torch.Size, by_row: bool) -> Tensor | None:
    """alpha or log_alpha as the kernels read it: [..., 1] or [..., K-1], contiguous."""
    return None if x is None else x.expand((*shape[:-1], 1) if by_row else shape).contiguous()


def _prepare(
    log_a: Tensor, log_b: Tensor, u: Tensor, alpha: Tensor | None, log_alpha: Tensor | None, kl: str
) -> tuple[tuple, dict[str, Any]]:
    """What both launches share: (inputs of the kernel, settings)."""
    by_row = all(x is None or x.dim() == 0 or x.shape[-1] == 1 for x in (alpha, log_alpha))
    inputs = (
        _by_row(log_a),
        _by_row(log_b),
        u.contiguous(),
        _spread(alpha, log_a.shape, by_row),
        _spread(log_alpha, log_a.shape, by_row),
        None if alpha is None else _nodes_on(log_a.device),
    )
    return inputs, {"K": log_a.shape[-1] + 1, "KL": None if alpha is None else kl, "ALPHA_ROWS": by_row}


def _launch(kernel: Any, tensors: tuple, settings: dict[str, Any]) -> None:
    log_a, log_b, *_ = tensors
    rows = log_a.shape[0]
    launch = _launch_for(architecture(log_a.device), settings["KL"], settings["K"])
    if rows:
        with device_of(log_a):
            kernel[(triton.cdiv(rows, launch.blocks["BLOCK_ROWS"]),)](
                *tensors, log_a.stride(0), log_b.stride(0), rows, **settings, **launch.arguments
            )


def forward(
    log_a: Tensor, log_b: Tensor, u: Tensor, alpha: Tensor | None, log_alpha: Tensor | None, kl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v, pi, log pi and the KL (empty without an alpha); see `kernels.kumaraswamy.kumaraswamy_sticks`."""
    inputs, settings = _prepare(log_a, log_b, u, alpha, log_alpha, kl)
    sticks, weights = log_a.shape, (*log_a.shape[:-1], settings["K"])
    outputs = tuple(log_a.new_empty(shape) for shape in (sticks, weights, weights))
    divergence = log_a.new_empty(0 if alpha is None else sticks)
    _launch(sticks_kernel, (*inputs, *outputs, None if alpha is None else divergence), settings)
    return *outputs, divergence


def backward(
    log_a: Tensor, log_b: Tensor, u: Tensor, alpha: Tensor | None, log_alpha: Tensor | None, kl: str, *grads: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_a, log_b, alpha and log_alpha from those of the four outputs; empty where there is no input."""
    inputs, settings = _prepare(log_a, log_b, u, alpha, log_alpha, kl)
    *grads, grad_kl = (None if g is None else g.contiguous() for g in grads)
    to_log_a, to_log_b = (x.new_empty(x.shape) for x in (log_a, log_b))
    given = (alpha, log_alpha)
    if grad_kl is None:
        settings["KL"] = None
        _launch(sticks_backward_kernel, (*inputs[:3], None, None, None, *grads, None, to_log_a, to_log_b, None, None), settings)
        return to_log_a, to_log_b, *(log_a.new_empty(0) if x is None else x.new_zeros(x.shape) for x in given)
    # The kernel sums over a row. Other dimensions along which alpha was broadcast are summed here, before any rounding.
    spread = [
        None if x is None else x.new_empty(x.shape, dtype=x.dtype if x.shape == g.shape else torch.float32)
        for x, g in zip(inputs[3:], given)
    ]
    _launch(sticks_backward_kernel, (*inputs, *grads, grad_kl, to_log_a, to_log_b, *spread), settings)
    moments = (
        log_a.new_empty(0) if x is None else x if x.shape == g.shape else x.sum_to_size(g.shape).to(g.dtype) for x, g in zip(spread, given)
    )
    return to_log_a, to_log_b, *moments


def specialisations(arch: int) -> list[Specialisation]:
    """Every committed configuration with both moments of alpha, by row, and with gradients of all outputs."""
    types = {"u": "*fp32", "nodes": "*fp32", "stride_a": "i32", "stride_b": "i32", "N": "i32"}
    of_kl = ("alpha", "log_alpha", "nodes", "kl", "grad_kl", "to_alpha", "to_log_alpha")  # None without a KL
    found = []
    for direction, kernel in (("forward", sticks_kernel), ("backward", sticks_backward_kernel)):
        for kl in TILES[arch]:
            for dtype, components in (("fp32", 15), ("fp32", 64), ("bf16", 15)):
                constexprs = {"K": components, "KL": kl, "ALPHA_ROWS": True}
                constexprs |= {} if kl else {name: None for name in of_kl if name in kernel.arg_names}
                signature = dict.fromkeys(kernel.arg_names, f"*{dtype}") | types
                name = f"{direction} {kl or 'sample'} K={components} {dtype}"
                found.append(Specialisation(name, kernel, signature, constexprs, _launch_for(arch, kl, components)))
    return found
