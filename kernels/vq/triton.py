"""Triton kernels of vector quantisation; the mathematics is in `kernels.vq.reference`.

There are four kernels. All add in a fixed order, so the same inputs give the same bits.

* `prepare_kernel` splits the codebook into bf16 parts, pads it to whole tiles, and computes |c|^2 / 2 (infinite for the padding).
* `assign_kernel` finds the nearest code of each row, gathers its vector and writes one partial commitment loss a program. The N x V
  scores stay in registers: each column of the score tile keeps its best value and tile, and a row is reduced once, after the last tile.
* `sums_kernel` adds the rows of each code as a product with one-hot rows, which are made in registers, and counts the codes in integers.
  The rows are split over programs.
* `update_kernel` adds the splits and applies moving averages, Laplace smoothing and dead-code replacement.

Products are taken in bf16, which has 8 significant bits. With x1 = bf16(x), x2 = bf16(x - x1) and x3 = x - x1 - x2, the sum
x1 + x2 + x3 is exactly x in fp32 (8 + 8 + 8 = 24 bits). Hence, accumulated in fp32:

* Scores are x.c = x1.c1 + (x1.c2 + x2.c1) + (x1.c3 + x2.c2 + x3.c1), without the terms below 2^-26 |x| |c|. Six products in bf16 cost the
  tensor cores as much as three in tf32 ("tf32x3"), are more precise, and need fewer registers. Rows of bf16 need three products only.
  Codes are split once, by `prepare_kernel`, so their tiles go straight from memory to the tensor cores.
* Sums of rows take three products, or one for rows of 16 bits, which are exact, because one-hot factors are exact in bf16. Tensor cores
  cut off what they add to a sum instead of rounding it, so tiles of rows are added to each other outside them.

G is the number of codebooks: R = N * Q rows and G = 1 when the heads share one, else R = N and G = Q. Row r of group g starts at
(r * G + g) * d in x, and its code is at r * G + g.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.backend import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
CODE_PARTS = tl.constexpr(3)  # bf16 parts of a code
_ANY = ["R", "G", "V"]  # sizes that vary: one compilation serves all their values


@triton.jit
def _cast(x, dtype: tl.constexpr):
    """x.to(dtype), rounded to nearest. Triton's interpreter truncates fp32 to bf16, so there the bits are rounded first."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, total):
    """total + a b in fp32. The interpreter would multiply the bit patterns of bf16 as integers, so there a and b are converted first."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _split(x, PARTS: tl.constexpr):
    """x -> PARTS tensors in bf16 whose sum is x: one part for bf16, two for fp16, three for fp32."""
    parts = ()
    rest = x
    for _ in tl.static_range(PARTS):
        part = _cast(rest, tl.bfloat16)
        parts = parts + (part,)  # noqa: RUF005 (Triton has no unpacking)
        rest = rest.to(tl.float32) - part.to(tl.float32)
    return parts


@triton.jit(do_not_specialize=_ANY)
def prepare_kernel(
    codebook,  # [G, V, d] fp32
    parts,  # [3, G, V_PAD, D] bf16
    half_norm,  # [G, V_PAD] fp32
    total,  # G * V_PAD
    V,
    V_PAD,
    d: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = row % V_PAD
    real = (row < total) & (code < V)
    source = (row // V_PAD * V + code)[:, None] * d
    norm = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        c = tl.load(codebook + source + column[None, :], mask=real[:, None] & (column < d)[None, :], other=0.0)
        rest = c
        for part in tl.static_range(CODE_PARTS):
            rounded = _cast(rest, tl.bfloat16)
            target = parts + part * total.to(tl.int64) * D + row[:, None] * D + column[None, :]
            tl.store(target, rounded, mask=(row < total)[:, None])
            rest -= rounded.to(tl.float32)
        c -= rest  # the norm of the parts that are multiplied
        norm += tl.sum(c * c, axis=1)
    tl.store(half_norm + row, tl.where(real, 0.5 * norm, float("inf")), mask=row < total)


@triton.jit
def _add_products(score, x_parts, c_pointers, part_stride, X_PARTS: tl.constexpr):
    """score [BLOCK_N, BLOCK_V] + x.c, from parts of x [BLOCK_N, BLOCK_D] and pointers to the first part of c [BLOCK_V, BLOCK_D]."""
    c_parts = ()
    for j in tl.static_range(CODE_PARTS):
        c_parts = c_parts + (tl.load(c_pointers + j * part_stride).T,)  # noqa: RUF005
    for order in tl.static_range(CODE_PARTS):  # the smallest products first
        for i in tl.static_range(X_PARTS):
            if i <= CODE_PARTS - 1 - order:
                score = _dot(x_parts[i], c_parts[CODE_PARTS - 1 - order - i], score)
    return score


@triton.jit(do_not_specialize=_ANY)
def assign_kernel(
    x,  # [N, Q, d]
    codebook,  # [G, V, d] fp32
    parts,  # [3, G, V_PAD, D] bf16
    half_norm,  # [G, V_PAD] fp32
    quantized,  # [N, Q, d], dtype of x
    codes,  # [N, Q] int64
    partial,  # [G, programs] fp32
    R,
    G,
    V,
    V_PAD,
    scale,  # 1 / (N * Q * d)
    d: tl.constexpr,
    D: tl.constexpr,  # d, padded to a multiple of BLOCK_D
    X_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAST_D: tl.constexpr,  # columns at a time in the last part
):
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < R
    WIDE: tl.constexpr = D > BLOCK_D  # rows are read in pieces, for every tile of codes
    column = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_V)
    x_pointers = x + (row * G + group)[:, None] * d + column[None, :]
    if not WIDE:
        x_parts = _split(tl.load(x_pointers, mask=there[:, None] & (column < d)[None, :], other=0.0), X_PARTS)

    best = tl.full([BLOCK_N, BLOCK_V], float("-inf"), tl.float32)
    best_tile = tl.zeros([BLOCK_N, BLOCK_V], tl.int32)
    part_stride = (G * V_PAD).to(tl.int64) * D
    c_pointers = parts + group * V_PAD * D + lane[:, None] * D + column[None, :]
    norms = half_norm + group * V_PAD + lane
    for start in range(0, V_PAD, BLOCK_V):
        score = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if WIDE:
            for first in range(0, D, BLOCK_D):
                piece = tl.load(x_pointers + first, mask=there[:, None] & (first + column < d)[None, :], other=0.0)
                score = _add_products(score, _split(piece, X_PARTS), c_pointers + start * D + first, part_stride, X_PARTS)
        else:
            score = _add_products(score, x_parts, c_pointers + start * D, part_stride, X_PARTS)
        score -= tl.load(norms + start)[None, :]
        better = score > best  # an equal score keeps the earlier tile
        best = tl.where(better, score, best)
        best_tile = tl.where(better, start, best_tile)

    top = tl.max(best, axis=1)
    index = tl.where(best == top[:, None], best_tile + lane[None, :], 2147483647)
    code = tl.min(index, axis=1).to(tl.int64)  # the lowest of equal scores
    code = tl.minimum(code, V - 1)  # rows with NaN or infinity have no best score; their code must still be within the codebook

    # This adds 0, which the compiler cannot know. Otherwise it would keep the rows and their addresses in registers through the
    # loop above instead of loading them again, and half as many programs would fit on a multiprocessor.
    row += tl.minimum(code, 0)
    there = row < R
    line = row * G + group
    tl.store(codes + line, code, mask=there)
    loss = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, d, LAST_D):
        piece = first + tl.arange(0, LAST_D)
        inside = there[:, None] & (piece < d)[None, :]
        at = line[:, None] * d + piece[None, :]
        given = tl.load(x + at, mask=inside, other=0.0)
        chosen = tl.load(codebook + (group * V + code)[:, None] * d + piece[None, :], mask=inside, other=0.0)
        chosen = _cast(chosen, given.dtype)
        tl.store(quantized + at, chosen, mask=inside)
        difference = given.to(tl.float32) - chosen.to(tl.float32)
        loss += tl.sum(difference * difference, axis=1)
    tl.store(partial + group * tl.num_programs(0) + tl.program_id(0), tl.sum(loss, axis=0) * scale)


@triton.jit(do_not_specialize=_ANY)
def sums_kernel(
    x,  # [N, Q, d]
    codes,  # [N, Q] int64
    sums,  # [splits, G, V, d] fp32
    counts,  # [splits, G, V] int32
    R,
    G,
    V,
    split_rows,
    tiles,  # of codes; a program has one tile of codes and BLOCK_D columns
    d: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COUNT_N: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_V
    label = first + tl.arange(0, BLOCK_V)
    column = tl.program_id(0) // tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    begin = split * split_rows
    end = tl.minimum(begin + split_rows, R)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        row = start + lane
        there = row < end
        line = row * G + group
        code = tl.load(codes + line, mask=there, other=-1).to(tl.int32)
        value = tl.load(x + line[:, None] * d + column[None, :], mask=there[:, None] & (column < d)[None, :], other=0.0)
        hit = label[:, None] == code[None, :]  # [BLOCK_V, BLOCK_N]
        if value.dtype == tl.float32:
            one = tl.where(hit, 1.0, 0.0).to(tl.bfloat16)
            value1, value2, value3 = _split(value, 3)
            tile = _dot(one, value3, tl.zeros([BLOCK_V, BLOCK_D], tl.float32))
            tile = _dot(one, value2, tile)
            total += _dot(one, value1, tile)
        else:
            total += _dot(tl.where(hit, 1.0, 0.0).to(value.dtype), value, tl.zeros([BLOCK_V, BLOCK_D], tl.float32))
    slab = (split * G + group) * V + label
    tl.store(sums + slab[:, None] * d + column[None, :], total, mask=(label < V)[:, None] & (column < d)[None, :])

    if tl.program_id(0) < tiles:
        count = tl.zeros([BLOCK_V], tl.int32)
        for start in range(begin, end, COUNT_N):
            row = start + tl.arange(0, COUNT_N)
            there = row < end
            slot = tl.load(codes + row * G + group, mask=there, other=-1).to(tl.int32) - first
            count += tl.histogram(slot, BLOCK_V, mask=there & (slot >= 0) & (slot < BLOCK_V))
        tl.store(counts + slab, count, mask=label < V)


@triton.jit(do_not_specialize=_ANY)
def update_kernel(
    x,  # [N, Q, d]
    sums,  # [splits, G, V, d] fp32
    counts,  # [splits, G, V] int32
    old_size,  # [G, V] fp32
    old_sum,  # [G, V, d] fp32
    candidates_u,  # [G, V] fp32
    codebook,  # [G, V, d] fp32, out
    cluster_size,  # [G, V] fp32, out
    embedding_sum,  # [G, V, d] fp32, out
    histogram,  # [G, V] int64, out
    splits,
    R,
    G,
    V,
    d: tl.constexpr,
    DECAY: tl.constexpr,
    EPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    real = code < V
    entry = group * V + code
    entries = (G * V).to(tl.int64)

    # The counts of a group add up to R, so the sum of its new sizes follows from the old ones, without the counts of other programs.
    size_sum = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, V, BLOCK_T):
        other = start + tl.arange(0, BLOCK_T)
        size_sum += tl.load(old_size + group * V + other, mask=other < V, other=0.0)
    rows = R.to(tl.float32)
    total = DECAY * tl.sum(size_sum, axis=0) + (1.0 - DECAY) * rows

    count = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, splits, UNROLL):
        for step in tl.static_range(UNROLL):
            split = start + step
            count += tl.load(counts + split * entries + entry, mask=real & (split < splits), other=0)
    size = DECAY * tl.load(old_size + entry, mask=real, other=0.0) + (1.0 - DECAY) * count.to(tl.float32)
    smoothed = (size + EPS) / (total + V * EPS) * total
    dead = size < THRESHOLD
    pick = tl.load(candidates_u + entry, mask=real, other=0.0) * rows
    pick = tl.minimum(pick.to(tl.int64), R - 1)

    for first in range(0, d, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        at = entry[:, None] * d + column[None, :]
        inside = real[:, None] & (column < d)[None, :]
        batch = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
        for start in range(0, splits, UNROLL):
            for step in tl.static_range(UNROLL):
                split = start + step
                batch += tl.load(sums + split * entries * d + at, mask=inside & (split < splits), other=0.0)
        average = DECAY * tl.load(old_sum + at, mask=inside, other=0.0) + (1.0 - DECAY) * batch
        fresh = tl.load(x + (pick * G + group)[:, None] * d + column[None, :], mask=inside & dead[:, None], other=0.0).to(tl.float32)
        tl.store(codebook + at, tl.where(dead[:, None], fresh, average / smoothed[:, None]), mask=inside)
        tl.store(embedding_sum + at, tl.where(dead[:, None], fresh * THRESHOLD, average), mask=inside)
    tl.store(cluster_size + entry, tl.where(dead, THRESHOLD, size), mask=real)
    tl.store(histogram + entry, count.to(tl.int64), mask=real)
