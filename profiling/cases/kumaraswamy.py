"""Cases of the Kumaraswamy sticks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels import kumaraswamy
from profiling.cases.case import Case, Inputs, Outputs, unchanged, with_gradients

STICK_OUTPUTS = ("v", "pi", "log_pi", "kl")


def _sticks(function: Callable, inputs: Inputs) -> Outputs:
    names = [name for name in ("log_a", "log_b", "alpha", "log_alpha") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    sticks = function(leaves["log_a"], leaves["log_b"], inputs["u"], leaves.get("alpha"), leaves.get("log_alpha"), kl=inputs["method"])
    outputs = {name: value for name, value in zip(STICK_OUTPUTS, sticks) if value is not None}
    return with_gradients(outputs, leaves, inputs["cotangents"])


def _sticks_exact(inputs: Inputs, _: Outputs) -> Outputs:
    limits = torch.finfo(torch.float32)  # a uniform of 0 or 1 counts as the float32 number next to it
    return _sticks(kumaraswamy.kumaraswamy_sticks_reference, inputs | {"u": inputs["u"].clamp(limits.tiny, 1 - limits.eps)})


def _sticks_case(
    name: str,
    rows: tuple[int, ...],
    pieces: int,
    reach: float = 1.0,
    edges: bool = False,
    kl: str | None = "exact",
    alpha: str = "rows",
    cotangents: str = "dense",
    dtype: torch.dtype = torch.float32,
    pinned: bool = False,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        shape = (*rows, pieces - 1)
        log_a, log_b = (reach * (2 * torch.rand(shape, generator=g) - 1) for _ in range(2))
        u = torch.rand(shape, generator=g)
        if reach == 5:  # corners of the square, where the formulas change
            corner = torch.randint(0, 9, shape, generator=g)
            log_a = torch.where(corner < 4, (corner % 2).float() * 10 - 5, log_a)
            log_b = torch.where(corner < 4, (corner // 2).float() * 10 - 5, log_b)
        if edges:
            values = torch.tensor([0, 1, 2**-24, 1 - 2**-24, 1 - 2**-23, torch.finfo(torch.float32).tiny, 1e-3, 1 - 1e-3])
            u = values[torch.randint(len(values), shape, generator=g)]
        concentration = (*rows, 1) if alpha != "sticks" else shape
        has_kl = kl is not None
        prior = 0.2 + 5 * torch.rand(concentration, generator=g)
        mean_log = prior.log() - 0.3 * torch.rand(concentration, generator=g)
        given = {name: torch.randn((*rows, pieces) if "pi" in name else shape, generator=g).to(dtype) for name in STICK_OUTPUTS}
        if not has_kl:
            given.pop("kl")
        if cotangents == "stride 0":
            given = {name: torch.tensor(0.7).to(dtype) for name in given}
        elif cotangents != "dense":
            given = {name: given[name] for name in cotangents.split(", ")}
        return {
            "log_a": log_a.to(dtype),
            "log_b": log_b.to(dtype),
            "u": u,
            "alpha": prior.to(dtype) if has_kl else None,
            "log_alpha": mean_log.to(dtype) if has_kl and alpha != "log of alpha" else None,
            "method": kl or "exact",
            "cotangents": given,
        }

    return Case(
        "kumaraswamy",
        name,
        make,
        run=lambda inputs, through=unchanged: _sticks(through(kumaraswamy.kumaraswamy_sticks), inputs),
        eager=lambda inputs: _sticks(kumaraswamy.kumaraswamy_sticks_reference, inputs),
        exact=_sticks_exact,
        dtype=dtype,
        pinned=pinned,
    )


def cases() -> list[Case]:
    return [
        _sticks_case("one stick", (1,), 2),
        _sticks_case("K=15, 37 rows", (37,), 15, pinned=True),
        _sticks_case("K=16, no padding", (13,), 16),
        _sticks_case("K=17, one over", (11,), 17),
        _sticks_case("K=64", (7,), 64),
        _sticks_case("K=3, batch axes", (5, 2, 3), 3),
        _sticks_case("corners of [-5, 5]", (29,), 8, reach=5),
        _sticks_case("u at its edges", (23,), 8, edges=True),
        _sticks_case("corners, u at its edges", (31,), 8, reach=5, edges=True),
        _sticks_case("corners, log pi only", (31,), 8, reach=5, cotangents="log_pi"),
        _sticks_case("corners, KL only", (31,), 8, reach=5, cotangents="kl"),
        _sticks_case("no KL", (17,), 8, kl=None),
        _sticks_case("series10", (11,), 8, kl="series10"),
        _sticks_case("alpha for each stick", (11,), 8, alpha="sticks"),
        _sticks_case("log alpha from alpha", (11,), 8, alpha="log of alpha"),
        _sticks_case("stride-0 gradients", (11,), 8, cotangents="stride 0"),
        _sticks_case("gradient of pi and KL only", (11,), 8, cotangents="pi, kl"),
        _sticks_case("gradient of v only", (11,), 8, cotangents="v"),
        _sticks_case("bf16", (13,), 8, dtype=torch.bfloat16),
        _sticks_case("fp16", (13,), 8, dtype=torch.float16),
    ]


def operators(device: torch.device) -> list[tuple[str, Any, tuple]]:
    g = torch.Generator().manual_seed(0)
    log_a, log_b, log_alpha = (torch.randn(shape, generator=g).to(device).requires_grad_() for shape in ((3, 4), (3, 4), (3, 1)))
    u, alpha = torch.rand(3, 4, generator=g).to(device), (1 + torch.rand(3, 1, generator=g)).to(device).requires_grad_()
    operator = torch.ops.aime_fast.kumaraswamy_sticks
    return [
        ("kumaraswamy_sticks", operator, (log_a, log_b, u, alpha, log_alpha, "exact")),
        ("kumaraswamy_sticks without KL", operator, (log_a, log_b, u, None, None, "exact")),
    ]
