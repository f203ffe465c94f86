"""Committed configurations and launchers of the RGB kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from kernels.backend import ARCHITECTURES, Launch, Specialisation, architecture, device_of
from kernels.rgb.triton import combine_kernel, gram_kernel, rotation_kernel

# Most programs of `gram_kernel`: four for each multiprocessor of an H200, which are all resident at once. One program adds their sums.
PROGRAMS = 528

# Most tasks -> launch. `gram_kernel` holds (n+1)(n+2)/2 accumulators for each column in flight, so more tasks leave room for fewer columns.
GRAM = {
    arch: {4: Launch({"BLOCK": 512}, 4, 3), 8: Launch({"BLOCK": 128}, 4, 3), 15: Launch({"BLOCK": 128}, 4, 1)} for arch in ARCHITECTURES
}
ROTATION = {arch: {4: Launch({"CHUNK": 32}, 4), 8: Launch({"CHUNK": 16}, 8), 15: Launch({"CHUNK": 16}, 8)} for arch in ARCHITECTURES}
COMBINE = {arch: Launch({"BLOCK": 1024}, 4) for arch in ARCHITECTURES}


def _for_tasks(table: dict[int, Launch], tasks: int) -> Launch:
    return next(launch for most, launch in table.items() if tasks <= most)


def _rows(gradients: Tensor) -> Tensor:
    return gradients if gradients.stride(1) == 1 else gradients.contiguous()


def rotation_(
    gradients: Tensor, direction: Tensor, angles: Tensor, has_direction: Tensor, settings: dict[str, Any], max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gram matrix and rotation: (gram, c, e, norm). `angles` and `has_direction` advance unless the norm is not finite.

    `settings` are the keyword arguments of `kernels.rgb.rotation_coefficients`.
    """
    gradients = _rows(gradients)
    n, size = gradients.shape
    arch = architecture(gradients.device)
    gram_launch, rotation_launch = _for_tasks(GRAM[arch], n), _for_tasks(ROTATION[arch], n)
    programs = min(PROGRAMS, triton.cdiv(size, gram_launch.blocks["BLOCK"]))
    new = gradients.new_empty
    partials = new((programs, (n + 1) * (n + 2) // 2), dtype=torch.float32)
    gram, c, e, norm = (new(shape, dtype=torch.float64) for shape in ((n + 1, n + 1), (n + 1,), (n + 1,), ()))
    with device_of(gradients):
        gram_kernel[(programs,)](
            gradients, direction, partials, size, gradients.stride(0), N=n,
            **gram_launch.arguments,
        )  # fmt: skip
        rotation_kernel[(1,)](
            partials, angles, has_direction.view(torch.uint8), gram, c, e, norm, programs,
            N=n, NP=triton.next_power_of_2(n + 1), MU=settings["mu"], LAM=settings["lam"], STEPS=settings["alpha_steps"],
            LR=settings["lr_inner"], NORM_WEIGHTED=settings["aggregation"] == "norm_weighted", MAX_NORM=max_norm or 0.0,
            **rotation_launch.arguments,
        )  # fmt: skip
    return gram, c, e, norm


def combine_(gradients: Tensor, direction: Tensor, c: Tensor, e: Tensor, norm: Tensor, result: Tensor) -> None:
    """Linear combinations, in place: `result`, and `direction` unless `norm` is not finite."""
    gradients = _rows(gradients)
    n, size = gradients.shape
    launch = COMBINE[architecture(gradients.device)]
    with device_of(gradients):
        combine_kernel[(triton.cdiv(size, launch.blocks["BLOCK"]),)](
            gradients, direction, c, e, norm, result, size, gradients.stride(0), N=n,
            **launch.arguments,
        )  # fmt: skip


def specialisations(arch: int) -> list[Specialisation]:
    """Every committed configuration, with the largest number of tasks that it serves."""
    types = dict.fromkeys(("c", "e", "norm", "gram_out", "c_out", "e_out", "norm_out"), "*fp64") | {"has_direction": "*u8"}
    types |= dict.fromkeys(("P", "stride", "programs"), "i32")
    settings = {"MU": 0.9, "LAM": 1.0, "STEPS": 3, "LR": 0.2, "NORM_WEIGHTED": True, "MAX_NORM": 5.0}
    chosen = []
    for n in GRAM[arch]:
        for dtype in ("fp32", "bf16"):
            chosen += [("gram", dtype, gram_kernel, GRAM[arch][n], {"N": n}), ("combine", dtype, combine_kernel, COMBINE[arch], {"N": n})]
        rotation = {"N": n, "NP": triton.next_power_of_2(n + 1)} | settings
        chosen.append(("rotation", "fp32", rotation_kernel, ROTATION[arch][n], rotation))
    found = []
    for what, dtype, kernel, launch, constants in chosen:
        signature = dict.fromkeys(kernel.arg_names, "*fp32") | types | {"gradients": f"*{dtype}"}
        found.append(Specialisation(f"rgb {what} {dtype} n={constants['N']}", kernel, signature, constants, launch))
    return found
