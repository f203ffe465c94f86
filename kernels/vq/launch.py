"""Committed configurations and launchers of the kernels of vector quantisation."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.backend import Launch, Specialisation, architecture, device_of
from kernels.vq.triton import assign_kernel, prepare_kernel, sums_kernel, update_kernel

_PAD = 128  # the codebook is padded to a multiple of this, which every BLOCK_V divides
_SPLIT_ROWS = 1024  # fewest rows of a split
_SPLITS = 32  # most splits, over all groups: the sums of a split are V * d numbers to write and read

# (precision, bytes of an element of x) -> launch. On sm_90 each fits at least twice on a multiprocessor for d <= 64,
# so that one program's comparisons run under the other's products.
_ASSIGN_80 = {
    ("bf16", 2): Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 3),
    ("bf16", 4): Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 3),
    ("fp32", 2): Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 2),
    ("fp32", 4): Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 2),
}
_ASSIGN_90 = {
    ("bf16", 2): Launch({"BLOCK_N": 128, "BLOCK_V": 64}, 8, 3),
    ("bf16", 4): Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 2),
    ("fp32", 2): Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 2),
    ("fp32", 4): Launch({"BLOCK_N": 128, "BLOCK_V": 32}, 8, 2),
}
ASSIGN = {80: _ASSIGN_80, 90: _ASSIGN_90, 100: _ASSIGN_90}
# bytes of an element of x -> launch
_SUMS_80 = {
    2: Launch({"BLOCK_V": 128, "BLOCK_N": 32, "COUNT_N": 1024}, 8, 2),
    4: Launch({"BLOCK_V": 64, "BLOCK_N": 16, "COUNT_N": 1024}, 4, 3),
}
_SUMS_90 = {
    2: Launch({"BLOCK_V": 128, "BLOCK_N": 64, "COUNT_N": 1024}, 8, 3),
    4: Launch({"BLOCK_V": 128, "BLOCK_N": 32, "COUNT_N": 1024}, 8, 3),
}
SUMS = {80: _SUMS_80, 90: _SUMS_90, 100: _SUMS_90}
_UPDATE = Launch({"BLOCK_V": 8, "BLOCK_T": 1024, "UNROLL": 8}, 4, 2)
UPDATE = {80: _UPDATE, 90: _UPDATE, 100: _UPDATE}
_PREPARE = Launch({"BLOCK": 16}, 4, 2)
PREPARE = {80: _PREPARE, 90: _PREPARE, 100: _PREPARE}


def _columns(width: int) -> dict[str, int]:
    """Constants of a code width: columns are taken 64 at a time, and at least 16, the shortest product of the tensor cores."""
    block = min(64, max(16, triton.next_power_of_2(width)))
    return {"d": width, "BLOCK_D": block}


def _padded(width: int) -> dict[str, int]:
    columns = _columns(width)
    return columns | {"D": triton.cdiv(width, columns["BLOCK_D"]) * columns["BLOCK_D"]}


def _last(width: int) -> dict[str, int]:
    return {"LAST_D": min(32, _columns(width)["BLOCK_D"])}


def _x_parts(dtype: torch.dtype, precision: str) -> int:
    """Parts of 8 bits in a number of this type; the fast mode takes the first."""
    return 1 if precision == "bf16" else {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]


def _c_parts(precision: str) -> int:
    return 1 if precision == "bf16" else 3


def assign(x: Tensor, codebook: Tensor, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, Q, d] fp32, bf16 or fp16, not empty; codebook [Q|1, V, d] fp32 -> quantized, codes int64 [N, Q], commitment fp32 []."""
    rows, heads, width = x.shape
    groups, size, _ = codebook.shape
    x, codebook = x.contiguous(), codebook.contiguous()
    arch = architecture(x.device)
    launch = ASSIGN[arch][precision, x.element_size()]
    columns = _padded(width)
    group_rows = rows * heads // groups
    programs = triton.cdiv(group_rows, launch.blocks["BLOCK_N"])
    padded = triton.cdiv(size, _PAD) * _PAD
    parts = torch.empty(_c_parts(precision), groups, padded, columns["D"], dtype=torch.bfloat16, device=x.device)
    half_norm = torch.empty(groups, padded, dtype=torch.float32, device=x.device)
    quantized = torch.empty_like(x)
    codes = torch.empty(rows, heads, dtype=torch.int64, device=x.device)
    partial = torch.empty(groups, programs, dtype=torch.float32, device=x.device)
    with device_of(x):
        prepare = PREPARE[arch]
        total = groups * padded
        prepare_kernel[(triton.cdiv(total, prepare.blocks["BLOCK"]),)](
            codebook,
            parts,
            half_norm,
            total,
            size,
            padded,
            PARTS=_c_parts(precision),
            **columns,
            **prepare.arguments,
        )
        assign_kernel[(programs, groups)](
            x,
            codebook,
            parts,
            half_norm,
            quantized,
            codes,
            partial,
            group_rows,
            groups,
            size,
            padded,
            1.0 / x.numel(),
            X_PARTS=_x_parts(x.dtype, precision),
            C_PARTS=_c_parts(precision),
            **columns,
            **_last(width),
            **launch.arguments,
        )
    return quantized, codes, partial.sum()


def split_rows(rows: int, groups: int) -> int:
    """Rows of a group that one program adds: a function of the sizes alone, so that the sums do not depend on the machine's."""
    splits = min(triton.cdiv(rows, _SPLIT_ROWS), max(1, _SPLITS // groups))
    return triton.cdiv(rows, splits * _SPLIT_ROWS) * _SPLIT_ROWS


def update(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    cluster_size: Tensor,
    embedding_sum: Tensor,
    candidates_u: Tensor,
    decay: float,
    eps: float,
    dead_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.vq.codebook_update` for x [N, Q, d] in fp32, bf16 or fp16, not empty, and a state in fp32."""
    rows, heads, width = x.shape
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
    new_codebook, new_size, new_sum = (
        torch.empty(t.shape, dtype=torch.float32, device=x.device) for t in (codebook, cluster_size, embedding_sum)
    )
    histogram = torch.empty(groups, size, dtype=torch.int64, device=x.device)
    with device_of(x):
        sums_kernel[(tiles * triton.cdiv(width, columns["BLOCK_D"]), groups, splits)](
            x,
            codes,
            sums,
            counts,
            group_rows,
            groups,
            size,
            per_split,
            tiles,
            **columns,
            **launch.arguments,
        )
        launch = UPDATE[arch]
        update_kernel[(triton.cdiv(size, launch.blocks["BLOCK_V"]), groups)](
            x,
            sums,
            counts,
            cluster_size.contiguous(),
            embedding_sum.contiguous(),
            candidates_u.float().contiguous(),
            new_codebook,
            new_size,
            new_sum,
            histogram,
            splits,
            group_rows,
            groups,
            size,
            DECAY=float(decay),
            EPS=float(eps),
            THRESHOLD=float(dead_threshold),
            **columns,
            **launch.arguments,
        )
    return new_codebook, new_size, new_sum, histogram


def specialisations(arch: int) -> list[Specialisation]:
    """Every committed configuration, for the width of the model's codes and a wider one that is read in pieces."""
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    made = []
    for width in (64, 128):
        for precision in ("fp32", "bf16"):
            constants = _padded(width) | {"PARTS": _c_parts(precision)}
            made.append(_specialise(f"vq prepare {precision}", prepare_kernel, PREPARE[arch], constants))
            for name, dtype in names.items():
                constants = _padded(width) | _last(width)
                constants |= {"X_PARTS": _x_parts(dtype, precision), "C_PARTS": _c_parts(precision)}
                launch = ASSIGN[arch][precision, dtype.itemsize]
                made.append(_specialise(f"vq assign {precision} x {name}", assign_kernel, launch, constants, f"*{name}"))
        for name, dtype in names.items():
            settings = {"DECAY": 0.99, "EPS": 1e-5, "THRESHOLD": 2.0}
            made.append(_specialise(f"vq sums x {name}", sums_kernel, SUMS[arch][dtype.itemsize], _columns(width), f"*{name}"))
            made.append(_specialise(f"vq update x {name}", update_kernel, UPDATE[arch], _columns(width) | settings, f"*{name}"))
    return made


def _specialise(name: str, kernel, launch: Launch, constants: dict, x: str = "") -> Specialisation:
    """`x` is the type of x and of `quantized`; those of the other arguments follow from their names."""
    types = {"parts": "*bf16", "codes": "*i64", "histogram": "*i64", "scale": "fp32", "x": x, "quantized": x}
    types |= {size: "i32" for size in ("R", "G", "V", "V_PAD", "total", "split_rows", "tiles", "splits")}
    types |= {"counts": "*i32"} | {constant: "constexpr" for constant in [*constants, *launch.blocks]}
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    return Specialisation(f"{name} d={constants['d']}", kernel, signature, constants, launch)
