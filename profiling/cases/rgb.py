"""Cases of RGB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aime_fast.config import OptimConfig
from kernels import rgb
from kernels.rgb.direct import rgb_direct
from profiling.cases.case import Case, Inputs, Outputs, unchanged

OPTIM = OptimConfig()
DEFAULTS = {
    "mu": OPTIM.rgb_mu, "lam": OPTIM.rgb_lambda, "alpha_steps": OPTIM.rgb_alpha_steps, "lr_inner": OPTIM.rgb_lr_inner,
    "aggregation": OPTIM.aggregation,
}  # fmt: skip
STATE = ("direction", "angles", "has_direction")


def _rotate(function: Callable, inputs: Inputs) -> Outputs:
    direction, angles, has_direction = (inputs[name].clone() for name in STATE)
    out = torch.full_like(direction, float("nan")) if inputs["out"] else None
    given = {} if out is None else {"out": out}
    result, gram, norm = function(inputs["gradients"], direction, angles, has_direction, **inputs["settings"], **given)
    result = torch.cat([piece.reshape(-1) for piece in result]) if isinstance(result, list) else result
    outputs = {"result": result, "direction": direction, "angles": angles, "has_direction": has_direction, "gram": gram, "norm": norm}
    return outputs if out is None else outputs | {"out": out}


def _rotate_direct(inputs: Inputs, working: torch.dtype) -> Outputs:
    """The algorithm on whole vectors, which shares no code with the kernels; clipped as `clip_grad_norm_` does."""
    gradients, settings = inputs["gradients"], dict(inputs["settings"])
    if isinstance(gradients, list):
        like = [next(g for g in column if g is not None) for column in zip(*gradients)]
        rows = [[torch.zeros_like(like[i]) if g is None else g for i, g in enumerate(task)] for task in gradients]
        gradients = torch.stack([torch.cat([g.reshape(-1) for g in task]) for task in rows])
    dtype = gradients.dtype
    gradients, direction, angles = gradients.to(working), inputs["direction"].to(working), inputs["angles"].to(working)
    max_norm = settings.pop("max_norm", None)
    rows = torch.cat([gradients, direction.unsqueeze(0)])
    outputs = {"gram": (rows @ rows.t()).double()}
    has_direction = inputs["has_direction"]
    if not bool(gradients.isfinite().all()):  # the state stays, and the result is not judged
        return {"direction": direction, "angles": angles, "has_direction": has_direction}
    result, new_direction, new_angles, norm = rgb_direct(gradients, direction, angles, bool(has_direction), **settings)
    if max_norm is not None:
        result = result * (max_norm / (norm + 1e-6)).clamp(max=1)
    outputs |= {"direction": new_direction, "angles": new_angles, "has_direction": torch.ones_like(has_direction), "norm": norm.double()}
    outputs |= {"out": result} if inputs["out"] else {}
    return outputs | {"result": result.to(working if inputs["out"] or working == torch.float64 else dtype)}


def _rotate_case(
    name: str,
    tasks: int,
    size: int,
    state: str = "moving",
    gradients: Callable[[Tensor, Tensor], Any] | None = None,
    dtype: torch.dtype = torch.float32,
    out: bool = False,
    pinned: bool = False,
    **settings: Any,
) -> Case:
    def make(g: torch.Generator) -> Inputs:
        common = torch.randn(size, generator=g)
        rows = torch.randn(tasks, size, generator=g) + 0.5 * common
        direction = torch.nn.functional.normalize(torch.randn(size, generator=g) + common, dim=0)
        angles = 0.3 * torch.rand(tasks, generator=g)
        if state == "new":
            direction, angles = torch.zeros(size), torch.zeros(tasks)
        given = rows.to(dtype) if gradients is None else gradients(rows.to(dtype), direction.to(dtype))
        has_direction = torch.tensor(state != "new")
        return {
            "gradients": given, "direction": direction, "angles": angles, "has_direction": has_direction,
            "settings": DEFAULTS | settings, "out": out,
        }  # fmt: skip

    return Case(
        "rgb",
        name,
        make,
        run=lambda inputs, through=unchanged: _rotate(through(rgb.rgb_rotate_), inputs),
        eager=lambda inputs: _rotate_direct(inputs, torch.float32),
        exact=lambda inputs, _: _rotate_direct(inputs, torch.float64),
        pinned=pinned,
    )


def _every_other_zero(rows: Tensor, _: Tensor) -> Tensor:
    rows[::2] = 0
    return rows


def _second_along_first(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda rows, _: torch.cat([rows[:1], factor * rows[:1], rows[2:]])


def _along_direction(rows: Tensor, direction: Tensor) -> Tensor:
    return torch.cat([5 * direction[None], -4 * direction[None], rows[2:]])


def _scales(rows: Tensor, _: Tensor) -> Tensor:
    return rows * torch.logspace(-6, 3, len(rows)).unsqueeze(1).to(rows.dtype)


def _not_finite(rows: Tensor, _: Tensor) -> Tensor:
    rows[0, -1] = float("nan")
    return rows


def _as_lists(rows: Tensor, _: Tensor) -> list[list[Tensor | None]]:
    """Two matrices and a vector; the second task lacks the first matrix, the third the vector."""
    size = rows.shape[1]
    tasks = [[row[:35].view(5, 7), row[35 : size - 11].view(1, -1), row[size - 11 :]] for row in rows]
    tasks[1][0] = tasks[2][2] = None
    return tasks


def _from_arena(rows: Tensor, _: Tensor) -> Tensor:
    arena = torch.full((rows.shape[0], rows.shape[1] + 13), float("nan"), dtype=rows.dtype)
    arena[:, 5 : 5 + rows.shape[1]] = rows
    return arena[:, 5 : 5 + rows.shape[1]]


def cases() -> list[Case]:
    sizes = [
        _rotate_case(f"n={n}, P={size}", n, size, pinned=n in (4, 8))
        for n, size in enumerate((127, 1009, 521, 4099, 257, 131, 1031, 509), 2)
    ]
    return [
        _rotate_case("n=1, P=1", 1, 1),
        _rotate_case("n=1, P=97", 1, 97),
        *sizes,
        _rotate_case("n=15, P=61", 15, 61, pinned=True),
        _rotate_case("first call", 4, 307, state="new"),
        _rotate_case("long vectors, several blocks a program", 2, 300007),
        _rotate_case("tasks without gradient", 5, 211, gradients=_every_other_zero),
        _rotate_case("no gradient at all", 3, 101, gradients=lambda rows, _: 0 * rows),
        _rotate_case("one gradient of two", 2, 101, gradients=_every_other_zero),
        _rotate_case("two aligned", 3, 499, gradients=_second_along_first(3)),
        _rotate_case("two opposed, no consensus", 2, 499, gradients=_second_along_first(-2)),
        _rotate_case("two opposed, first call", 2, 499, state="new", gradients=_second_along_first(-2)),
        _rotate_case("along and against the direction", 4, 499, gradients=_along_direction),
        _rotate_case("norms from 1e-6 to 1e3", 4, 997, gradients=_scales),
        _rotate_case("not finite: the state stays", 3, 97, gradients=_not_finite),
        _rotate_case("mean of the unit vectors", 4, 401, aggregation="mean"),
        _rotate_case("mean, a task without gradient", 3, 401, gradients=_every_other_zero, aggregation="mean"),
        _rotate_case("other settings", 4, 401, mu=0.5, lam=0.1, alpha_steps=5, lr_inner=0.7),
        _rotate_case("no steps", 3, 401, alpha_steps=0),
        _rotate_case("clipped", 4, 401, max_norm=0.5),
        _rotate_case("not clipped, written in place", 4, 401, max_norm=1e4, out=True),
        _rotate_case("bf16 gradients", 4, 1013, dtype=torch.bfloat16),
        _rotate_case("bf16 gradients, fp32 result", 3, 1013, dtype=torch.bfloat16, out=True),
        _rotate_case("fp16 gradients", 4, 509, dtype=torch.float16),
        _rotate_case("lists of tensors, some missing", 4, 149, gradients=_as_lists),
        _rotate_case("columns first in memory", 3, 211, gradients=lambda rows, _: rows.t().contiguous().t()),
        _rotate_case("rows of an arena", 3, 211, gradients=_from_arena),
    ]


def operators(device: torch.device) -> list[tuple[str, Any, tuple]]:
    g = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(3, 29, generator=g),
        torch.randn(29, generator=g),
        torch.rand(3, generator=g),
        torch.tensor(True),
        torch.zeros(29),
    )
    arguments = (*(t.to(device) for t in tensors), *DEFAULTS.values(), 1.0)
    return [("rgb_rotate_", torch.ops.aime_fast.rgb_rotate_, arguments)]
