"""Triton kernels of GroupNorm and SiLU; the mathematics is in `kernels.group_norm.reference`.

Channels are last in memory, so a frame is a matrix [HW, C]. A program has one frame and some whole groups of it, W columns: enough for
rows of 32 bytes or more, few enough to read the columns a second time from the cache. Both kernels sweep twice over tiles [BLOCK_HW,
BLOCK_C] of places and channels: once for the sums, then in reverse, from what was read last, for the result.

Each place of the tile keeps sums of its own over the sweep; places of a column, and then columns of a group, are added once, after it: a
sum over a tile waits for all warps. Nothing cancels for values far from 0: means move by deviations (Welford, 1962), are combined by
their squared deviations (Chan et al., 1979), and are corrected by the mean of the deviations from them. All add in a fixed order, so the
same inputs give the same bits.

For 16-bit x the forward reads 2 bytes an element and writes 2; the backward reads 4 and writes 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(C: tl.constexpr, CG: tl.constexpr, W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr):
    """What a program works on: its frame, the columns and rows of a tile, and the channel and group (of all frames) of each column."""
    PARTS: tl.constexpr = C // W  # programs of a frame
    frame = (tl.program_id(0) // PARTS).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    channel = tl.program_id(0) % PARTS * W + column
    return frame, column, tl.arange(0, BLOCK_HW), channel, frame * (C // CG) + channel // CG


@triton.jit
def _group_sum(v, column, CG: tl.constexpr, W: tl.constexpr):
    """v [BLOCK_C] -> for each column the sum over its group. Columns from W on hold 0."""
    if W == CG:
        return tl.sum(v, axis=0) + tl.zeros_like(v)
    same = (column // CG)[:, None] == (column // CG)[None, :]
    return tl.sum(tl.where(same, v[None, :], 0.0), axis=1)


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit(do_not_specialize=["HW"])
def norm_kernel(
    x,  # [N, HW, C]
    weight,  # [C] fp32
    bias,  # [C] fp32
    y,  # [N, HW, C], dtype of x
    mean,  # [N, C / CG] fp32
    rstd,  # [N, C / CG] fp32
    HW,
    EPS: tl.constexpr,
    C: tl.constexpr,
    CG: tl.constexpr,  # channels of a group
    W: tl.constexpr,  # channels of a program
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):
    frame, column, row, channel, group = _place(C, CG, W, BLOCK_C, BLOCK_HW)
    real = column < W
    at = frame * HW * C + row[:, None] * C + channel[None, :]
    means = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)  # of the tiles so far, at each place
    spreads = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)  # sums of squared deviations from them
    for start in range(0, HW, BLOCK_HW):
        there = (start + row < HW)[:, None] & real[None, :]
        tile = tl.load(x + at + start * C, mask=there, other=0.0).to(tl.float32)
        shift = tl.where(there, tile - means, 0.0)
        share = 1.0 / (start // BLOCK_HW + 1)
        means += shift * share
        spreads += shift * shift * (1.0 - share)
    count = ((HW - row + BLOCK_HW - 1) // BLOCK_HW).to(tl.float32)[:, None]  # tiles that have this place
    middle = tl.sum(means * count, axis=0) / HW
    middle += tl.sum((means - middle[None, :]) * count, axis=0) / HW  # what rounding left out
    shifts = means - middle[None, :]
    spread = tl.sum(spreads + shifts * shifts * count, axis=0)

    group_mean = _group_sum(middle, column, CG, W) / CG
    group_mean += _group_sum(tl.where(real, middle - group_mean, 0.0), column, CG, W) / CG
    shift = tl.where(real, middle - group_mean, 0.0)
    variance = _group_sum(spread + shift * shift * HW, column, CG, W) / (CG * HW).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))
    first = real & (column % CG == 0)
    tl.store(mean + group, group_mean, mask=first)
    tl.store(rstd + group, scale, mask=first)

    scale *= tl.load(weight + channel, mask=real, other=0.0)
    b = tl.load(bias + channel, mask=real, other=0.0)
    last = (HW - 1) // BLOCK_HW * BLOCK_HW
    for back in range(0, HW, BLOCK_HW):
        start = last - back
        there = (start + row < HW)[:, None] & real[None, :]
        tile = tl.load(x + at + start * C, mask=there, other=0.0).to(tl.float32)
        u = (tile - group_mean[None, :]) * scale[None, :] + b[None, :]
        tl.store(y + at + start * C, u * _sigmoid(u), mask=there)


@triton.jit
def _normal_and_slope(x, grad, centre, scale, w, b, there):
    """xhat, and the gradient of u, of one tile."""
    normal = (tl.load(x, mask=there, other=0.0).to(tl.float32) - centre) * scale
    u = normal * w + b
    s = _sigmoid(u)
    return normal, tl.load(grad, mask=there, other=0.0).to(tl.float32) * (s + u * s * (1.0 - s))


@triton.jit(do_not_specialize=["frames", "HW"])
def norm_backward_kernel(
    grad,  # [N, HW, C], dtype of x
    x,  # [N, HW, C]
    weight,  # [C] fp32
    bias,  # [C] fp32
    mean,  # [N, C / CG] fp32
    rstd,  # [N, C / CG] fp32
    to_x,  # [N, HW, C], dtype of x
    to_affine,  # [2, N, C] fp32, gradients of weight and bias by frame
    frames,  # N
    HW,
    C: tl.constexpr,
    CG: tl.constexpr,
    W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):
    frame, column, row, channel, group = _place(C, CG, W, BLOCK_C, BLOCK_HW)
    real = column < W
    at = frame * HW * C + row[:, None] * C + channel[None, :]
    w = tl.load(weight + channel, mask=real, other=0.0)
    b = tl.load(bias + channel, mask=real, other=0.0)
    centre = tl.load(mean + group, mask=real, other=0.0)
    scale = tl.load(rstd + group, mask=real, other=0.0)
    to_ws = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    to_bs = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for start in range(0, HW, BLOCK_HW):
        there = (start + row < HW)[:, None] & real[None, :]
        tile = at + start * C
        normal, slope = _normal_and_slope(x + tile, grad + tile, centre[None, :], scale[None, :], w[None, :], b[None, :], there)
        to_ws += slope * normal
        to_bs += slope
    to_w, to_b = tl.sum(to_ws, axis=0), tl.sum(to_bs, axis=0)
    tl.store(to_affine + frame * C + channel, to_w, mask=real)
    tl.store(to_affine + (frames + frame) * C + channel, to_b, mask=real)

    size = (CG * HW).to(tl.float32)
    along = _group_sum(w * to_w, column, CG, W) / size
    level = _group_sum(w * to_b, column, CG, W) / size
    last = (HW - 1) // BLOCK_HW * BLOCK_HW
    for back in range(0, HW, BLOCK_HW):
        start = last - back
        there = (start + row < HW)[:, None] & real[None, :]
        tile = at + start * C
        normal, slope = _normal_and_slope(x + tile, grad + tile, centre[None, :], scale[None, :], w[None, :], b[None, :], there)
        result = (slope * w[None, :] - level[None, :] - normal * along[None, :]) * scale[None, :]
        tl.store(to_x + tile, result, mask=there)
