"""Cases of GroupNorm and SiLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels import group_norm
from profiling.cases.case import Case, Inputs, Outputs, unchanged, with_gradients


def _normalised(function: Callable, inputs: Inputs) -> Outputs:
    leaves = {name: inputs[name].detach().requires_grad_(name in inputs["leaves"]) for name in ("x", "weight", "bias")}
    y = function(*leaves.values(), inputs["groups"])
    return with_gradients({"y": y}, {name: leaves[name] for name in inputs["leaves"]}, inputs["cotangents"])


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    groups: int,
    dtype: torch.dtype = torch.float32,
    values: str = "normal",
    leaves: tuple[str, ...] = ("x", "weight", "bias"),
    stride_0: bool = False,
    pinned: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        x = torch.randn(shape, generator=g)
        if values == "far":
            x = x + 30
        elif values == "large":
            x = 100 * x
        elif values == "channels far apart":
            x = x + 10 * torch.randn(1, shape[1], 1, 1, generator=g)
        elif values == "equal":
            x = x[:, :1, :1, :1].expand(shape)
        elif values == "outlier":
            x[:, :, 0, 0] = 1000.0
        layout = torch.contiguous_format if values == "channels first" else torch.channels_last
        grad = torch.tensor(0.7) if stride_0 else torch.randn(shape, generator=g)
        return {
            "x": x.to(dtype).contiguous(memory_format=layout),
            "weight": 1 + 0.5 * torch.randn(shape[1], generator=g),
            "bias": 0.5 * torch.randn(shape[1], generator=g),
            "groups": groups,
            "leaves": leaves,
            "cotangents": {"y": grad.to(dtype)},
        }

    return Case(
        "group_norm",
        name,
        make,
        run=lambda inputs, through=unchanged: _normalised(through(group_norm.group_norm_silu), inputs),
        eager=lambda inputs: _normalised(group_norm.group_norm_silu_reference, inputs),
        exact=lambda inputs, _: _normalised(group_norm.group_norm_silu_reference, inputs),
        dtype=dtype,
        pinned=pinned,
    )


def cases() -> list[Case]:
    bf16, f16 = torch.bfloat16, torch.float16
    return [
        _case("C=48, 8 groups of 6, 13x11", (3, 48, 13, 11), 8, pinned=True),
        _case("C=96, 8 groups of 12, 16x16", (2, 96, 16, 16), 8),
        _case("C=128, 8 groups of 16, 21x21", (1, 128, 21, 21), 8),
        _case("C=256, 8 groups of 32, 6x6", (2, 256, 6, 6), 8),
        _case("C=32, 42x42, groups apart", (1, 32, 42, 42), 8),
        _case("C=16, 4 groups, 4x4", (5, 16, 4, 4), 4),
        _case("one group of 7 channels", (3, 7, 5, 3), 1),
        _case("one group of 130 channels", (2, 130, 9, 5), 1),
        _case("a group for each of 5 channels", (2, 5, 7, 7), 5),
        _case("one pixel", (3, 48, 1, 1), 8),
        _case("one frame, one group, one channel", (1, 1, 3, 5), 1),
        _case("channels first", (3, 48, 5, 7), 8, values="channels first"),
        _case("far from the origin", (2, 96, 21, 21), 8, values="far"),
        _case("channels far apart", (2, 48, 16, 16), 8, values="channels far apart"),
        _case("the first pixel far off", (2, 32, 21, 21), 8, values="outlier"),
        _case("large", (2, 48, 9, 9), 8, values="large"),
        _case("all equal", (2, 32, 5, 5), 8, values="equal"),
        _case("stride-0 gradients", (2, 48, 5, 7), 8, stride_0=True),
        _case("gradient of x only", (2, 48, 5, 7), 8, leaves=("x",)),
        _case("gradient of x and bias only", (2, 48, 5, 7), 8, leaves=("x", "bias")),
        # Channels first, because eager PyTorch 2.13 on a CPU crashes where channels are last and x needs no gradient.
        _case("gradient of weight and bias only", (2, 48, 5, 7), 8, leaves=("weight", "bias"), values="channels first"),
        _case("bf16", (3, 96, 11, 11), 8, dtype=bf16, pinned=True),
        _case("bf16, channels first", (2, 48, 6, 6), 8, dtype=bf16, values="channels first"),
        _case("bf16, 21x21, far from the origin", (1, 128, 21, 21), 8, dtype=bf16, values="far"),
        _case("bf16, 42x42", (1, 128, 42, 42), 8, dtype=bf16),
        _case("fp16", (3, 64, 8, 8), 8, dtype=f16),
    ]


def operators(device: torch.device) -> list[tuple[str, Any, tuple]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 3, 5, generator=g).to(device)
    weight, bias = (torch.randn(2, 8, generator=g).to(device)).unbind()
    arguments = (weight.clone().requires_grad_(), bias.clone().requires_grad_(), 2, 1e-5)
    operator, last = torch.ops.aime_fast.group_norm_silu, x.contiguous(memory_format=torch.channels_last)
    return [
        ("group_norm_silu", operator, (last.clone().requires_grad_(), *arguments)),
        ("group_norm_silu, channels first", operator, (x.requires_grad_(), *arguments)),
    ]
