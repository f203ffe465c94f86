"""Rotation-based gradient balancing (RGB): rotate each task gradient a little towards the consensus, then sum them.

With task gradients g_i, gbar_i = g_i / |g_i|, a consensus direction d that is a moving average, and w_i the unit vector
orthogonal to gbar_i in the plane of gbar_i and d, the rotated gradients are r_i = cos(alpha_i) gbar_i + sin(alpha_i) w_i. The
angles take a few gradient steps on 1/(n(n-1)) sum_{i<j} (1 - r_i.r_j) + lambda/(4n) sum_i |r_i - gbar_i|^2.

Every vector of the algorithm lies in span{g_1..g_n, d_old}, so two passes over memory suffice: one for the Gram matrix of
these n + 1 vectors (`gram_matrix`), one for result and new direction as linear combinations of them. In between,
`rotation_coefficients` works on (n+1)^2 numbers. With C_ij = gbar_i.gbar_j, p_i = gbar_i.d, q_i = sqrt((1 - p_i)(1 + p_i)):

    gbar_i.w_j = (p_i - p_j C_ij) / q_j              w_i.w_j = (1 - p_i^2 - p_j^2 + p_i p_j C_ij) / (q_i q_j)
    dF/dalpha_i = -1/(n(n-1)) sum_{j != i} [-sin_i (cos_j C_ij + sin_j gbar_i.w_j) + cos_i (cos_j gbar_j.w_i + sin_j w_i.w_j)]
                  + lambda sin_i / (2n)

and the norm of the result is sqrt(c^T M c), with c the coefficients of the result and M the Gram matrix. `kernels.rgb.direct` is the
algorithm as published, on whole vectors; tests compare the two.

The publication leaves some cases open. Both forms treat them alike:
* a task with |g_i| <= 1e-12 is left out: n counts the others, and its stored angle is kept for its return;
* a single task is not rotated;
* a task with |p_i| > 0.999 keeps angle 0: along d there is nothing to rotate, and against d the plane of rotation is not defined;
* if the gbar_i cancel (|mean| < 1e-3) there is no consensus: d stays the old direction, and without one nothing is rotated;
* if mu d_old and (1 - mu) y cancel (length < 1e-3, y the unit vector of the mean), d restarts from y.

Origin: "Preserving Gradient Harmony: A Rotation-Based Gradient Balancing for Multi-Task Conflict Remedy", OpenReview l0QAezg8HX.
Aggregation: AIME's description weights the rotated gradients by their norms; its code takes the mean of the unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

MIN_NORM = 1e-12  # a gradient this short counts as zero
MIN_CONSENSUS = 1e-3  # a mean of unit vectors this short is rounding noise in float32
ALIGNED = 0.999  # |cosine| to d from which a task is not rotated
MAX_ANGLE = math.pi / 2 - 1e-6
CLIP_EPS = 1e-6  # added to the norm before clipping, as in `torch.nn.utils.clip_grad_norm_`
AGGREGATIONS = ("norm_weighted", "mean")
MAX_TASKS = 15  # supported by the kernels
BLOCK = 1 << 17  # numbers of a vector in a block: its rows fit the cache, and float32 sums stay short

TaskGradients = Tensor | Sequence[Sequence[Tensor | None]]  # [n, P], or for each task one tensor a parameter


def parameter_columns(gradients: TaskGradients) -> list[list[Tensor | None]]:
    """One entry for each parameter tensor: the gradient of every task, or None. Raises ValueError as `gram_matrix` does."""
    if isinstance(gradients, Tensor):
        if gradients.ndim != 2:
            raise ValueError(f"RGB: task gradients are {list(gradients.shape)}; expected [n, P], or for each task a list of tensors")
        return [list(gradients)]
    if len({len(task) for task in gradients}) != 1:
        raise ValueError(
            f"RGB: the tasks have {[len(task) for task in gradients]} gradient tensors; "
            "expected the same number for each task (None where a task does not reach a parameter)"
        )
    columns = [list(column) for column in zip(*gradients)]
    for place, column in enumerate(columns):
        if all(gradient is None for gradient in column):
            raise ValueError(f"RGB: no task has a gradient for parameter {place}; leave it out, or pass zeros for one task")
    return columns


def first_present(column: list[Tensor | None]) -> Tensor:
    """A gradient of the parameter, for its shape and dtype."""
    return next(gradient for gradient in column if gradient is not None)


def check_sizes(
    columns: list[list[Tensor | None]],
    direction: Tensor,
    angles: Tensor | None = None,
    aggregation: str = AGGREGATIONS[0],
    max_norm: float | None = None,
    out: Tensor | None = None,
) -> None:
    """Raise ValueError where the arguments of `kernels.rgb.rgb_rotate_` do not fit each other."""
    size, tasks = sum(first_present(column).numel() for column in columns), len(columns[0])
    if size != direction.numel():
        raise ValueError(
            f"RGB: the task gradients hold {size} numbers and the direction {direction.numel()}; the set of shared parameters has changed"
        )
    if angles is not None and angles.shape != (tasks,):
        raise ValueError(f"RGB: {tasks} tasks, but angles are {list(angles.shape)}; expected [{tasks}]")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"RGB: aggregation {aggregation!r} is unknown; choose 'norm_weighted' or 'mean'")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"RGB: max_norm={max_norm}; expected a positive length, or None for no clipping")
    if out is not None and (out.shape != direction.shape or not out.is_contiguous()):
        raise ValueError(f"RGB: out is {list(out.shape)} with strides {out.stride()}; expected contiguous {list(direction.shape)}")


def _blocks(columns: list[list[Tensor | None]], direction: Tensor) -> Iterator[tuple[list[int], Tensor, int]]:
    """Yield (indices of the vectors that are present, those vectors [m, p], offset) for each block; index n is d_old."""
    start = 0
    for column in columns:
        present = [i for i, gradient in enumerate(column) if gradient is not None] + [len(column)]
        size = first_present(column).numel()
        vectors = [g.reshape(-1).to(direction.dtype) for g in column if g is not None] + [direction[start : start + size]]
        for offset in range(0, size, BLOCK):
            yield present, torch.stack([v[offset : offset + BLOCK] for v in vectors]), start + offset
        start += size


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right [k, p] with full float32 products: on a GPU a matmul may round its inputs to TF32."""
    if left.device.type == "cpu":
        return left @ right
    return (left.unsqueeze(2) * right.unsqueeze(0)).sum(1)


def _inner_products(rows: Tensor) -> Tensor:
    """rows [m, p] -> [m, m], full precision as in `_matmul`."""
    if rows.device.type == "cpu":
        return rows @ rows.t()
    return (rows.unsqueeze(1) * rows.unsqueeze(0)).sum(2)


@torch.no_grad()
def gram_matrix(gradients: TaskGradients, direction: Tensor) -> Tensor:
    """Inner products of the n task gradients and, last, the old direction.

    Args:
        gradients: [n, P]; or for each task a list of one tensor for each parameter, None where the task does not reach it.
        direction: old direction [P].

    Returns:
        float64 [n+1, n+1]. Products are summed in the dtype of `direction` inside blocks, and in float64 over blocks.

    Raises:
        ValueError: tasks with different numbers of tensors, a parameter that no task reaches, or sizes that do not add up to P.
    """
    columns = parameter_columns(gradients)
    check_sizes(columns, direction)
    return _gram(columns, direction)


def _gram(columns: list[list[Tensor | None]], direction: Tensor) -> Tensor:
    partial: dict[tuple[int, ...], Tensor] = {}  # one small matrix for all parameters that the same tasks reach
    with torch.autocast(direction.device.type, enabled=False):
        for present, rows, _ in _blocks(columns, direction):
            product = _inner_products(rows).double()
            key = tuple(present)
            partial[key] = partial[key] + product if key in partial else product
    n = len(columns[0])
    gram = torch.zeros(n + 1, n + 1, dtype=torch.float64, device=direction.device)
    for present, product in partial.items():
        # A one-hot product places the entries: an index tensor made from a host list would be copied to the device.
        spread = torch.stack([torch.arange(n + 1, device=direction.device) == i for i in present]).double()  # [m, n+1]
        gram = gram + spread.t() @ product @ spread
    return gram


@torch.no_grad()
def rotation_coefficients(
    gram: Tensor, angles: Tensor, has_direction: Tensor, *, mu: float, lam: float, alpha_steps: int, lr_inner: float, aggregation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RGB in the space of the n + 1 vectors.

    Args:
        gram: [n+1, n+1], the old direction last.
        angles: angles of the last call [n], zeros at first.
        has_direction: bool or 0-1 scalar on the device; false before the first call, when d_old is ignored; so is a d_old of 0.
        mu: weight of the old direction in the new one.
        lam: weight of the pull towards the original gradients.
        alpha_steps, lr_inner: number and size of the gradient steps on the angles.
        aggregation: "norm_weighted" (sum |g_i| r_i) or "mean" (mean r_i).

    Returns:
        c: [n+1], result = sum_i c_i g_i + c_n d_old.
        e: [n+1], new direction = sum_i e_i g_i + e_n d_old, of length 1, or 0 where no direction exists yet.
        angles: [n].
        result_norm: |result|, scalar.
        All in float64 except `angles`, which keep their dtype.

    Source: see the module docstring.
    """
    n = angles.shape[0]
    gram, kept_angles = gram.double(), angles.double()
    has_direction = has_direction.to(torch.bool)
    one = gram.new_ones(())
    zero = gram.new_zeros(())

    # Norms and cosines, 0 for a task without a gradient.
    square = gram.diagonal()[:n]
    active = square > MIN_NORM**2  # [n]
    norm = torch.where(active, square, one).sqrt()
    inverse = torch.where(active, 1 / norm, zero)  # [n], 1 / |g_i|
    cosine = gram[:n, :n] * inverse.unsqueeze(0) * inverse.unsqueeze(1)  # [n, n]
    count = active.sum()
    tasks = count.clamp_min(1).double()

    # Consensus y, and the new direction d = (old d_old + new y) / length.
    mean_square = cosine.sum() / tasks.square()
    has_consensus = mean_square > MIN_CONSENSUS**2
    inverse_y = torch.where(has_consensus, torch.where(has_consensus, mean_square, one).rsqrt(), zero)
    with_y = cosine.sum(1) / tasks * inverse_y  # [n], gbar_i . y
    old_square = gram[n, n]
    has_old = has_direction & (old_square > MIN_NORM**2)
    with_old = torch.where(has_old, gram[:n, n] * inverse, zero)  # [n], gbar_i . d_old
    old_y = with_old.sum() / tasks * inverse_y
    old = torch.where(has_old, torch.where(has_consensus, mu * one, one), zero)
    new = torch.where(has_consensus, torch.where(has_old, (1 - mu) * one, one), zero)
    length_square = old.square() * torch.where(has_old, old_square, zero) + 2 * old * new * old_y + new.square()
    cancelled = has_old & has_consensus & (length_square < MIN_CONSENSUS**2)
    old, new, length_square = (torch.where(cancelled, x, y) for x, y in ((zero, old), (one, new), (one, length_square)))
    has_new = has_old | has_consensus
    inverse_d = torch.where(has_new, torch.where(has_new, length_square, one).rsqrt(), zero)
    e_tasks = new * inverse_y * inverse_d / tasks * inverse  # [n]
    e_old = old * inverse_d

    # The planes of rotation.
    p = (old * with_old + new * with_y) * inverse_d  # [n], gbar_i . d
    free = active & (p.abs() <= ALIGNED) & has_new & (count > 1)
    inverse_q = torch.where(free, torch.where(free, (1 - p) * (1 + p), one).rsqrt(), zero)
    others = 1 - torch.eye(n, dtype=gram.dtype, device=gram.device)
    gw = (p.unsqueeze(1) - p.unsqueeze(0) * cosine) * inverse_q.unsqueeze(0) * others  # [n, n], gbar_i . w_j
    pp = p.square()
    ww = 1 - pp.unsqueeze(1) - pp.unsqueeze(0) + p.unsqueeze(1) * p.unsqueeze(0) * cosine
    ww = ww * inverse_q.unsqueeze(1) * inverse_q.unsqueeze(0) * others  # [n, n], w_i . w_j
    gg = cosine * others

    angle = torch.where(free, kept_angles, zero)
    for _ in range(alpha_steps):
        sin, cos = torch.where(active, angle.sin(), zero), torch.where(active, angle.cos(), zero)
        drop = sin * (gg @ cos + gw @ sin) - cos * (gw.t() @ cos + ww @ sin)  # -(dr_i/dalpha_i) . sum_{j != i} r_j
        slope = drop / (tasks * (tasks - 1).clamp_min(1)) + lam * sin / (2 * tasks)
        angle = torch.where(free, (angle - lr_inner * slope).clamp(0, MAX_ANGLE), zero)

    # Back to the n + 1 vectors: r_i = (cos - p sin / q) gbar_i + (sin / q) d.
    share = torch.where(active, one, zero) if aggregation == "norm_weighted" else inverse / tasks  # h_i / |g_i|
    turn = torch.where(free, angle.sin(), zero) * inverse_q  # [n]
    along_d = (share * norm * turn).sum()
    c_tasks = share * (angle.cos() - p * turn) + along_d * e_tasks
    c = torch.cat([c_tasks, (along_d * e_old).view(1)])
    e = torch.cat([e_tasks, e_old.view(1)])
    result_norm = (c @ gram @ c).clamp_min(0).sqrt()
    return c, e, torch.where(active, angle, kept_angles).to(angles.dtype), result_norm


def _combine_(columns: list[list[Tensor | None]], direction: Tensor, c: Tensor, e: Tensor, finite: Tensor, result: Tensor) -> None:
    """Second pass over memory: writes sum_i c_i g_i + c_n d to `result` and, if `finite`, sum_i e_i g_i + e_n d to `direction`."""
    weights = torch.stack([c, e]).to(direction.dtype)  # [2, n+1]
    with torch.autocast(direction.device.type, enabled=False):
        for present, rows, start in _blocks(columns, direction):
            chosen = weights if len(present) == weights.shape[1] else torch.stack([weights[:, i] for i in present], 1)
            total, new = _matmul(chosen, rows).unbind()
            block = slice(start, start + rows.shape[1])
            result[block] = total
            direction[block] = torch.where(finite, new, rows[-1])


def rotate_reference_(
    columns: list[list[Tensor | None]],
    direction: Tensor,
    angles: Tensor,
    has_direction: Tensor,
    settings: dict[str, Any],
    max_norm: float | None,
    result: Tensor,
) -> tuple[Tensor, Tensor]:
    """`kernels.rgb.rgb_rotate_` in plain PyTorch: (gram, norm); writes `result` [P] and the state."""
    gram = _gram(columns, direction)
    c, e, new_angles, norm = rotation_coefficients(gram, angles, has_direction, **settings)
    if max_norm is not None:
        c = c * (max_norm / (norm + CLIP_EPS)).clamp(max=1)
    finite = torch.isfinite(norm)
    _combine_(columns, direction, c, e, finite, result)
    angles.copy_(torch.where(finite, new_angles, angles))
    has_direction.logical_or_(finite)
    return gram, norm
