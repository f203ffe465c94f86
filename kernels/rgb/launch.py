"""Committed configurations and launchers of the RGB kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.backend import ARCHITECTURES, Launch, Specialisation, architecture, device_of
from kernels.rgb.triton import combine_kernel, gram_kernel, rotation_kernel

PROGRAMS = 528  # of pass 1 at most: four for each multiprocessor of an H200, all resident at once, and few enough for one program to add up

# Pass 1 holds (n+1)(n+2)/2 accumulators for each column in flight, so many tasks leave room for fewer columns.
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
    gradients: Tensor,
    direction: Tensor,
    angles: Tensor,
    has_direction: Tensor,
    mu: float,
    lam: float,
    alpha_steps: int,
    lr_inner: float,
    aggregation: str,
    max_norm: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass 1 and the rotation: (gram, c, e, norm); `angles` and `has_direction` advance unless the norm is not finite."""
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
            N=n, NP=triton.next_power_of_2(n + 1), MU=mu, LAM=lam, STEPS=alpha_steps, LR=lr_inner,
            NORM_WEIGHTED=aggregation == "norm_weighted", MAX_NORM=max_norm,
            **rotation_launch.arguments,
        )  # fmt: skip
    return gram, c, e, norm


def combine_(gradients: Tensor, direction: Tensor, c: Tensor, e: Tensor, norm: Tensor, result: Tensor) -> None:
    """Pass 2, in place: `result`, and `direction` unless `norm` is not finite."""
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
    settings = {"MU": 0.9, "LAM": 1.0, "STEPS": 3, "LR": 0.2, "NORM_WEIGHTED": True, "MAX_NORM": 5.0}
    sizes = {"P": "i32", "stride": "i32", "N": "constexpr", "BLOCK": "constexpr"}
    made = []
    for n, launch in GRAM[arch].items():
        for dtype in ("fp32", "bf16"):
            memory = {"gradients": f"*{dtype}", "direction": "*fp32"}
            gram = memory | {"partials": "*fp32"} | sizes
            combine = memory | {"c": "*fp64", "e": "*fp64", "norm": "*fp64", "result": "*fp32"} | sizes
            made += [
                Specialisation(f"rgb gram {dtype} n={n}", gram_kernel, gram, {"N": n}, launch),
                Specialisation(f"rgb combine {dtype} n={n}", combine_kernel, combine, {"N": n}, COMBINE[arch]),
            ]
    for n, launch in ROTATION[arch].items():
        constants = {"N": n, "NP": triton.next_power_of_2(n + 1)} | settings
        rotation = {"partials": "*fp32", "angles": "*fp32", "has_direction": "*u8"}
        rotation |= {name: "*fp64" for name in ("gram_out", "c_out", "e_out", "norm_out")} | {"programs": "i32"}
        rotation |= {name: "constexpr" for name in [*constants, "CHUNK"]}
        made.append(Specialisation(f"rgb rotation n={n}", rotation_kernel, rotation, constants, launch))
    return made
