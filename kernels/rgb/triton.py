"""Triton kernels of `kernels.rgb`: three launches that read each gradient twice.

    gram      each program sums the (n+1)(n+2)/2 inner products over its share of the columns        reads 4(n + 1) bytes a parameter
    rotation  one program adds the partial sums in float64 and computes angles and coefficients      nothing of size P
    combine   result and new direction as linear combinations of the n + 1 vectors                   reads 4(n + 1), writes 8

In float32 that is 8n + 16 bytes a parameter, 48 for n = 4. The number of programs depends on P alone and sums are taken in a fixed order,
so the same gradients give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.rgb import reference

_MIN_NORM = tl.constexpr(reference.MIN_NORM)
_MIN_CONSENSUS = tl.constexpr(reference.MIN_CONSENSUS)
_ALIGNED = tl.constexpr(reference.ALIGNED)
_MAX_ANGLE = tl.constexpr(reference.MAX_ANGLE)
_CLIP_EPS = tl.constexpr(reference.CLIP_EPS)


@triton.jit
def gram_kernel(
    gradients,  # [N, P], rows `stride` apart
    direction,  # [P]
    partials,  # [programs, PAIRS] float32; pair (i, j), j <= i, at i (i + 1) / 2 + j; vector N is the direction
    P,
    stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PAIRS: tl.constexpr = (N + 1) * (N + 2) // 2
    program = tl.program_id(0).to(tl.int64)
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)  # noqa: RUF005 (Triton has no unpacking)
    for start in range(program * BLOCK, P, tl.num_programs(0).to(tl.int64) * BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < P
        vectors = ()
        for i in tl.static_range(N):
            vectors = vectors + (tl.load(gradients + i * stride + column, mask=inside, other=0.0).to(tl.float32),)  # noqa: RUF005
        vectors = vectors + (tl.load(direction + column, mask=inside, other=0.0),)  # noqa: RUF005
        added = ()
        for i in tl.static_range(N + 1):
            for j in tl.static_range(i + 1):
                added = added + (sums[i * (i + 1) // 2 + j] + vectors[i] * vectors[j],)  # noqa: RUF005
        sums = added
    for pair in tl.static_range(PAIRS):
        tl.store(partials + program * PAIRS + pair, tl.sum(sums[pair]))


@triton.jit
def _sin_cos(x):
    """Sine and cosine of x in [0, pi/2], float64, by 10 and 11 terms of their series. Those of the library take any x and need a stack."""
    square = x * x
    sin = 1.0 - square * (1.0 / 420.0)
    cos = 1.0 - square * (1.0 / 380.0)
    for i in tl.static_range(9):
        sin = 1.0 - square * (1.0 / ((18 - 2 * i) * (19 - 2 * i))) * sin
        cos = 1.0 - square * (1.0 / ((17 - 2 * i) * (18 - 2 * i))) * cos
    return x * sin, cos


@triton.jit
def _diagonal(matrix, row, column):
    return tl.sum(tl.where(row == column, matrix, 0.0), 1)


@triton.jit
def rotation_kernel(
    partials,  # [programs, PAIRS] float32
    angles,  # [N], read and written
    has_direction,  # uint8 scalar, read and written
    gram_out,  # [N+1, N+1] float64
    c_out,  # [N+1] float64
    e_out,  # [N+1] float64
    norm_out,  # float64 scalar
    programs,
    N: tl.constexpr,
    NP: tl.constexpr,  # power of two above N
    MU: tl.constexpr,
    LAM: tl.constexpr,
    STEPS: tl.constexpr,
    LR: tl.constexpr,
    NORM_WEIGHTED: tl.constexpr,
    MAX_NORM: tl.constexpr,  # 0: no clipping
    CHUNK: tl.constexpr,
):
    """`kernels.rgb.rotation_coefficients` line by line, with the same names."""
    PAIRS: tl.constexpr = (N + 1) * (N + 2) // 2
    index = tl.arange(0, NP)
    row, column = index[:, None], index[None, :]
    high, low = tl.maximum(row, column), tl.minimum(row, column)
    pair = high * (high + 1) // 2 + low
    present = (row <= N) & (column <= N)
    gram = tl.zeros([NP, NP], tl.float64)
    for start in range(0, programs, CHUNK):
        program = start + tl.arange(0, CHUNK)
        mask = (program < programs)[:, None, None] & present[None, :, :]
        gram += tl.sum(tl.load(partials + program[:, None, None] * PAIRS + pair[None, :, :], mask=mask, other=0.0).to(tl.float64), 0)
    tl.store(gram_out + row * (N + 1) + column, gram, mask=present)

    task = index < N
    square = tl.where(task, _diagonal(gram, row, column), 0.0)
    active = square > _MIN_NORM * _MIN_NORM
    norm = tl.sqrt(tl.where(active, square, 1.0))
    inverse = tl.where(active, 1.0 / norm, 0.0)
    between_tasks = (row < N) & (column < N)
    cosine = tl.where(between_tasks, gram, 0.0) * inverse[None, :] * inverse[:, None]
    count = tl.sum(active.to(tl.float64))
    tasks = tl.maximum(count, 1.0)

    mean_square = tl.sum(tl.sum(cosine, 1)) / (tasks * tasks)
    has_consensus = mean_square > _MIN_CONSENSUS * _MIN_CONSENSUS
    inverse_y = tl.where(has_consensus, 1.0 / tl.sqrt(tl.where(has_consensus, mean_square, 1.0)), 0.0)
    with_y = tl.sum(cosine, 1) / tasks * inverse_y
    old_square = tl.sum(tl.sum(tl.where((row == N) & (column == N), gram, 0.0), 1))
    has_old = (tl.load(has_direction) != 0) & (old_square > _MIN_NORM * _MIN_NORM)
    with_old = tl.where(has_old, tl.where(task, tl.sum(tl.where(column == N, gram, 0.0), 1) * inverse, 0.0), 0.0)
    old_y = tl.sum(with_old) / tasks * inverse_y
    one = tl.sum(tl.where(index == 0, 1.0, 0.0).to(tl.float64))
    old = tl.where(has_old, tl.where(has_consensus, MU * one, one), 0.0)
    new = tl.where(has_consensus, tl.where(has_old, (1 - MU) * one, one), 0.0)
    length_square = old * old * tl.where(has_old, old_square, 0.0) + 2 * old * new * old_y + new * new
    cancelled = has_old & has_consensus & (length_square < _MIN_CONSENSUS * _MIN_CONSENSUS)
    old = tl.where(cancelled, 0.0, old)
    new = tl.where(cancelled, 1.0, new)
    length_square = tl.where(cancelled, 1.0, length_square)
    has_new = has_old | has_consensus
    inverse_d = tl.where(has_new, 1.0 / tl.sqrt(tl.where(has_new, length_square, 1.0)), 0.0)
    e_tasks = new * inverse_y * inverse_d / tasks * inverse
    e_old = old * inverse_d

    p = (old * with_old + new * with_y) * inverse_d
    can_turn = has_new & (count > 1)
    free = active & (tl.where(can_turn, tl.abs(p), 2.0) <= _ALIGNED)  # the interpreter cannot & a block with a scalar
    inverse_q = tl.where(free, 1.0 / tl.sqrt(tl.where(free, (1 - p) * (1 + p), 1.0)), 0.0)
    other = row != column
    gw = tl.where(other, (p[:, None] - p[None, :] * cosine) * inverse_q[None, :], 0.0)
    ww = 1 - p[:, None] * p[:, None] - p[None, :] * p[None, :] + p[:, None] * p[None, :] * cosine
    ww = tl.where(other, ww * inverse_q[:, None] * inverse_q[None, :], 0.0)
    gg = tl.where(other, cosine, 0.0)

    stored = tl.load(angles + index, mask=task, other=0.0)
    angle = tl.where(free, stored.to(tl.float64), 0.0)
    for _ in tl.static_range(STEPS):
        sin, cos = _sin_cos(angle)
        sin, cos = tl.where(active, sin, 0.0), tl.where(active, cos, 0.0)
        along_g = tl.sum(gg * cos[None, :] + gw * sin[None, :], 1)
        along_w = tl.sum(gw * cos[:, None], 0) + tl.sum(ww * sin[None, :], 1)
        slope = (sin * along_g - cos * along_w) / (tasks * tl.maximum(tasks - 1, 1.0)) + LAM * sin / (2 * tasks)
        angle = tl.where(free, tl.minimum(tl.maximum(angle - LR * slope, 0.0), _MAX_ANGLE), 0.0)

    share = active.to(tl.float64) if NORM_WEIGHTED else inverse / tasks
    sin, cos = _sin_cos(angle)
    turn = tl.where(free, sin, 0.0) * inverse_q
    along_d = tl.sum(share * norm * turn)
    c = share * (cos - p * turn) + along_d * e_tasks
    c = tl.where(index == N, along_d * e_old, tl.where(task, c, 0.0))
    e = tl.where(index == N, e_old, tl.where(task, e_tasks, 0.0))
    square = tl.sum(tl.sum(gram * c[None, :], 1) * c)
    result_norm = tl.sqrt(tl.where(square < 0, 0.0, square))  # a GPU's maximum of nan and 0 is 0
    if MAX_NORM > 0:
        c = c * tl.minimum(MAX_NORM / (result_norm + _CLIP_EPS), 1.0)

    finite = result_norm < float("inf")  # false for nan too
    tl.store(c_out + index, c, mask=index <= N)
    tl.store(e_out + index, e, mask=index <= N)
    tl.store(norm_out, result_norm)
    tl.store(angles + index, tl.where(finite, tl.where(active, angle.to(stored.dtype), stored), stored), mask=task)
    tl.store(has_direction, 1, mask=finite)


@triton.jit
def combine_kernel(
    gradients,  # [N, P], rows `stride` apart
    direction,  # [P], read and written
    c,  # [N+1] float64
    e,  # [N+1] float64
    norm,  # float64 scalar; where it is not finite the direction stays
    result,  # [P]
    P,
    stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < P
    old = tl.load(direction + column, mask=inside, other=0.0)
    total = tl.load(c + N).to(tl.float32) * old
    new = tl.load(e + N).to(tl.float32) * old
    for i in tl.static_range(N):
        gradient = tl.load(gradients + i * stride + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(c + i).to(tl.float32) * gradient
        new += tl.load(e + i).to(tl.float32) * gradient
    tl.store(result + column, total, mask=inside)
    tl.store(direction + column, tl.where(tl.load(norm) < float("inf"), new, old), mask=inside)
