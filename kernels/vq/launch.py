"""Committed configurations and launchers of the kernels of vector quantisation."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.backend import ARCHITECTURES, Launch, Specialisation, architecture, device_of
from kernels.vq.reference import DEAD_THRESHOLD, EPS
from kernels.vq.triton import CODE_PARTS, assign_kernel, prepare_kernel, sums_kernel, update_kernel

_PAD = 128  # the codebook is padded to a multiple of this; every BLOCK_V divides it
_SPLIT_ROWS = 1024  # a split has at least this many rows
_SPLITS = 32  # most splits, over all groups: each split writes V * d sums, which are read again

# Bytes of an element of x -> launch. On sm_90 a multiprocessor holds at least two programs of `assign_kernel` for d <= 64,
# so that one compares scores while the other multiplies.
ASSIGN = {arch: dict.fromkeys((2, 4), Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 2)) for arch in ARCHITECTURES}
_SUMS_90 = {
    2: Launch({"BLOCK_V": 128, "BLOCK_N": 64, "COUNT_N": 1024}, 8, 3),
    4: Launch({"BLOCK_V": 128, "BLOCK_N": 32, "COUNT_N": 1024}, 8, 3),
}
_SUMS_80 = {
    2: Launch({"BLOCK_V": 128, "BLOCK_N": 32, "COUNT_N": 1024}, 8, 2),
    4: Launch({"BLOCK_V": 64, "BLOCK_N": 16, "COUNT_N": 1024}, 4, 3),
}
SUMS = {80: _SUMS_80, 90: _SUMS_90, 100: _SUMS_90}
UPDATE = {arch: Launch({"BLOCK_V": 8, "BLOCK_T": 1024, "UNROLL": 8}, 4, 2) for arch in ARCHITECTURES}
PREPARE = {arch: Launch({"BLOCK": 16}, 4, 2) for arch in ARCHITECTURES}

_X_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bf16 parts whose sum is exactly a number of this type


def _columns(width: int) -> dict[str, int]:
    """Constants for codes of this width: 64 columns at a time, and at least 16, the smallest inner size of a tensor-core product."""
    return {"d": width, "BLOCK_D": min(64, max(16, triton.next_power_of_2(width)))}


def _padded_columns(width: int) -> dict[str, int]:
    """`_columns`, and the width padded to whole tiles."""
    block = _columns(width)["BLOCK_D"]
    return _columns(width) | {"D": triton.cdiv(width, block) * block}


def _assign_columns(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of `assign_kernel` for codes of this width and x of this dtype."""
    columns = _padded_columns(width)
    return columns | {"LAST_D": min(32, columns["BLOCK_D"]), "X_PARTS": _X_PARTS[dtype]}


def assign(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.vq.vector_quantize` without its gradient, for x [N, Q, d] in fp32, bf16 or fp16, not empty, and a codebook in fp32."""
    rows, heads, width = x.shape
    groups, size, _ = codebook.shape
    x, codebook = x.contiguous(), codebook.contiguous()
    arch = architecture(x.device)
    prepare, launch = PREPARE[arch], ASSIGN[arch][x.element_size()]
    columns = _padded_columns(width)
    group_rows = rows * heads // groups
    programs = triton.cdiv(group_rows, launch.blocks["BLOCK_N"])
    padded = triton.cdiv(size, _PAD) * _PAD
    total = groups * padded
    parts = torch.empty(CODE_PARTS.value, groups, padded, columns["D"], dtype=torch.bfloat16, device=x.device)
    half_norm = torch.empty(groups, padded, dtype=torch.float32, device=x.device)
    quantized = torch.empty_like(x)
    codes = torch.empty(rows, heads, dtype=torch.int64, device=x.device)
    partial = torch.empty(groups, programs, dtype=torch.float32, device=x.device)
    with device_of(x):
        prepare_kernel[(triton.cdiv(total, prepare.blocks["BLOCK"]),)](
            codebook, parts, half_norm, total, size, padded,
            **columns, **prepare.arguments,
        )  # fmt: skip
        assign_kernel[(programs, groups)](
            x, codebook, parts, half_norm, quantized, codes, partial, group_rows, groups, size, padded, 1.0 / x.numel(),
            **_assign_columns(width, x.dtype), **launch.arguments,
        )  # fmt: skip
    return quantized, codes, partial.sum()


def split_rows(rows: int, groups: int) -> int:
    """Rows of a group that one program adds. It depends on the sizes alone, so every machine adds in the same order."""
    splits = min(triton.cdiv(rows, _SPLIT_ROWS), max(1, _SPLITS // groups))
    return triton.cdiv(rows, splits * _SPLIT_ROWS) * _SPLIT_ROWS


def update(
    x: Tensor, codes: Tensor, state: tuple[Tensor, ...], candidates_u: Tensor, decay: float, eps: float, dead_threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.vq.codebook_update` for x [N, Q, d] in fp32, bf16 or fp16, not empty, and a state in fp32.

    `state` is (codebook, cluster_size, embedding_sum).
    """
    rows, heads, width = x.shape
    codebook, cluster_size, embedding_sum = state
    groups, size, _ = codebook.shape
    x, codes = x.contiguous(), codes.contiguous()
    arch = architecture(x.device)
    launch = SUMS[arch][x.element_size()]
    columns = _columns(width)
    group_rows = rows * heads // groups
    per_split = split_rows(group_rows, groups)
    splits = triton.cdiv(group_rows, per_split)
    tiles = triton.cdiv(size, launch.blocks["BLOCK_V"])
    sums = torch.empty(splits, groups, size, width, dtype=torch.float32, device=x.device)
    counts = torch.empty(splits, groups, size, dtype=torch.int32, device=x.device)
    new_state = tuple(torch.empty(t.shape, dtype=torch.float32, device=x.device) for t in state)
    histogram = torch.empty(groups, size, dtype=torch.int64, device=x.device)
    with device_of(x):
        sums_kernel[(tiles * triton.cdiv(width, columns["BLOCK_D"]), groups, splits)](
            x, codes, sums, counts, group_rows, groups, size, per_split, tiles,
            **columns, **launch.arguments,
        )  # fmt: skip
        launch = UPDATE[arch]
        update_kernel[(triton.cdiv(size, launch.blocks["BLOCK_V"]), groups)](
            x, sums, counts, cluster_size.contiguous(), embedding_sum.contiguous(), candidates_u.float().contiguous(),
            *new_state, histogram, splits, group_rows, groups, size,
            DECAY=float(decay), EPS=float(eps), THRESHOLD=float(dead_threshold),
            **columns, **launch.arguments,
        )  # fmt: skip
    return *new_state, histogram


def specialisations(arch: int) -> list[Specialisation]:
    """Every committed configuration, for the width of the model's codes and a wider one that is read in pieces."""
    types = {"parts": "*bf16", "codes": "*i64", "histogram": "*i64", "counts": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("R", "G", "V", "V_PAD", "total", "split_rows", "tiles", "splits"), "i32")
    settings = {"DECAY": 0.99, "EPS": EPS, "THRESHOLD": DEAD_THRESHOLD}
    found = []
    for width in (64, 128):
        columns = _columns(width)
        chosen = [("prepare", "fp32", prepare_kernel, PREPARE[arch], _padded_columns(width))]
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            chosen += [
                ("assign", name, assign_kernel, ASSIGN[arch][dtype.itemsize], _assign_columns(width, dtype)),
                ("sums", name, sums_kernel, SUMS[arch][dtype.itemsize], columns),
                ("update", name, update_kernel, UPDATE[arch], columns | settings),
            ]
        for what, x, kernel, launch, constants in chosen:
            signature = dict.fromkeys(kernel.arg_names, "*fp32") | types | {"x": f"*{x}", "quantized": f"*{x}"}
            found.append(Specialisation(f"vq {what} {x} d={width}", kernel, signature, constants, launch))
    return found
