"""Committed configurations and launchers of the kernels of GroupNorm and SiLU."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import ARCHITECTURES, Launch, Specialisation, architecture, device_of
from kernels.group_norm.reference import EPS
from kernels.group_norm.triton import norm_backward_kernel, norm_kernel

_COLUMNS = 64  # most channels of a program with several groups
_SECTOR = 32  # bytes: a program's piece of a row is at least this long where it can be, for that is what memory hands out
_CACHED = 65536  # bytes of x that a program may read twice: those of all programs that run at a time fit the L2 cache

# ELEMENTS of a tile of either kernel, padding included. Smaller tiles take fewer warps.
TILES = {arch: Launch({"ELEMENTS": 2048}, 4, 1) for arch in ARCHITECTURES}


def _groups_together(groups: int, width: int, places: int, item: int) -> int:
    """How many groups of `width` channels, `item` bytes each, one program takes: the most that the limits above allow."""
    choices = [k for k in range(1, groups + 1) if groups % k == 0 and (k == 1 or k * width <= _COLUMNS)]
    long = [k for k in choices if k * width * item >= _SECTOR] or choices[-1:]
    return max((k for k in long if places * k * width * item <= _CACHED), default=long[0])


def _launch_for(arch: int, channels: int, groups: int, places: int, item: int) -> tuple[dict[str, int], Launch]:
    """Sizes of the kernels, and the committed configuration with its tile, for frames of this size."""
    width = channels // groups
    columns = _groups_together(groups, width, places, item) * width
    block = triton.next_power_of_2(columns)
    launch = TILES[arch]
    rows = min(max(1, launch.blocks["ELEMENTS"] // block), triton.next_power_of_2(places))
    warps = max(1, min(launch.num_warps, rows * block // 256))  # 8 elements a thread or more
    blocks = {"BLOCK_C": block, "BLOCK_HW": rows}
    return {"C": channels, "CG": width, "W": columns}, launch._replace(blocks=blocks, num_warps=warps)


def _run(kernel: Any, x: Tensor, groups: int, arguments: tuple, settings: dict[str, Any]) -> None:
    """Launch one program for each frame and part of its groups."""
    frames, channels, height, width = x.shape
    sizes, launch = _launch_for(architecture(x.device), channels, groups, height * width, x.element_size())
    with device_of(x):
        kernel[(frames * (channels // sizes["W"]),)](*arguments, height * width, **settings, **sizes, **launch.arguments)


def _last(x: Tensor) -> Tensor:
    """x with channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and rstd, for x [N, C, H, W] in fp32, bf16 or fp16, not empty; see `kernels.group_norm.group_norm_silu`."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = (_last(x), weight.contiguous(), bias.contiguous(), y, mean, rstd)
    _run(norm_kernel, x, groups, arguments, {"EPS": float(eps)})
    return y, mean, rstd


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias in one tensor [2, C]; their sums by frame are added in a fixed order."""
    frames, channels = x.shape[:2]
    to_x = torch.empty_like(x, memory_format=torch.channels_last)
    by_frame = torch.empty(2, frames, channels, dtype=torch.float32, device=x.device)
    affine = (weight.contiguous(), bias.contiguous())
    arguments = (_last(grad), _last(x), *affine, mean, rstd, to_x, by_frame, frames)
    _run(norm_backward_kernel, x, groups, arguments, {})
    return to_x, by_frame.sum(1)


def specialisations(arch: int) -> list[Specialisation]:
    """Every committed configuration, for sizes of the model: C, G, H = W."""
    sizes = [(32, 8, 8), (48, 8, 16), (96, 8, 4), (128, 8, 21), (128, 8, 42), (256, 8, 11)]
    kernels = [("forward", norm_kernel, {"EPS": EPS}), ("backward", norm_backward_kernel, {})]
    found = []
    for direction, kernel, settings in kernels:
        for channels, groups, grid in sizes:
            for dtype, item in (("fp32", 4), ("bf16", 2)):
                constants, launch = _launch_for(arch, channels, groups, grid**2, item)
                signature = dict.fromkeys(kernel.arg_names, "*fp32") | {"HW": "i32", "frames": "i32"}
                signature |= dict.fromkeys(("x", "y", "grad", "to_x"), f"*{dtype}")
                name = f"group norm {direction} C={channels} {grid}x{grid} {dtype}"
                found.append(Specialisation(name, kernel, signature, settings | constants, launch))
    return found
