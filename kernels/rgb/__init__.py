"""Rotation-based gradient balancing; the derivation is in `kernels.rgb.reference`, the Triton kernels in `kernels.rgb.triton`.

The kernels run behind one operation, `aime_fast::rgb_rotate_`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.rgb.reference import (
    AGGREGATIONS,
    MAX_TASKS,
    MIN_NORM,
    TaskGradients,
    check_sizes,
    first_present,
    gram_matrix,
    parameter_columns,
    rotate_reference_,
    rotation_coefficients,
)

__all__ = ["AGGREGATIONS", "MAX_TASKS", "MIN_NORM", "TaskGradients", "gram_matrix", "rgb_rotate", "rgb_rotate_", "rotation_coefficients"]


@torch.library.custom_op("aime_fast::rgb_rotate_", mutates_args=("direction", "angles", "has_direction", "result"))
def _rotate_op_(
    gradients: Tensor,
    direction: Tensor,
    angles: Tensor,
    has_direction: Tensor,
    result: Tensor,
    mu: float,
    lam: float,
    alpha_steps: int,
    lr_inner: float,
    aggregation: str,
    max_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """gradients [n, P] -> gram [n+1, n+1] and norm, float64; writes `result` [P] and the state."""
    settings = {"mu": mu, "lam": lam, "alpha_steps": alpha_steps, "lr_inner": lr_inner, "aggregation": aggregation}
    if not use_triton(gradients):
        return rotate_reference_([list(gradients)], direction, angles, has_direction, settings, max_norm, result)
    from kernels.rgb import launch  # here, so that machines without Triton have the reference

    gram, c, e, norm = launch.rotation_(gradients, direction, angles, has_direction, settings, max_norm)
    launch.combine_(gradients, direction, c, e, norm, result)
    return gram, norm


@_rotate_op_.register_fake
def _(gradients, direction, angles, has_direction, result, mu, lam, alpha_steps, lr_inner, aggregation, max_norm):
    n = gradients.shape[0]
    return gradients.new_empty((n + 1, n + 1), dtype=torch.float64), gradients.new_empty((), dtype=torch.float64)


def _arena(columns: list[list[Tensor | None]]) -> Tensor:
    """Lists of tensors -> [n, P], which the kernels read. It costs one more pass over memory than gradients that are flat already."""
    rows = ([torch.zeros_like(first_present(c)) if c[i] is None else c[i] for c in columns] for i in range(len(columns[0])))
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def _has_kernel(columns: list[list[Tensor | None]], direction: Tensor) -> bool:
    """Whether the kernels run for these gradients; everything else runs the reference."""
    narrow = all(first_present(column).dtype in (torch.float32, torch.bfloat16, torch.float16) for column in columns)
    return use_triton(direction) and direction.dtype == torch.float32 and narrow and len(columns[0]) <= MAX_TASKS


@torch.no_grad()
def rgb_rotate_(
    gradients: TaskGradients,
    direction: Tensor,
    angles: Tensor,
    has_direction: Tensor,
    *,
    mu: float,
    lam: float,
    alpha_steps: int,
    lr_inner: float,
    aggregation: str,
    max_norm: float | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
    """Balance task gradients and advance the state in place, without synchronising with the device.

    Where |result| is not finite, `direction`, `angles` and `has_direction` stay as they are.

    Args:
        gradients: [n, P]; or for each task a list of one tensor for each parameter, None where the task does not reach it. Kernels
            read float32, bfloat16 or float16, at most 15 tasks, and a float32 direction; everything else runs the reference.
        direction: old direction [P], overwritten by the new one. Zero means that there is none yet.
        angles: angles of the last call [n], overwritten by the new ones.
        has_direction: bool scalar on the device, false before the first call.
        mu, lam, alpha_steps, lr_inner, aggregation: as in `rotation_coefficients`.
        max_norm: clip the result to this length. It costs nothing: the norm is known before the result is formed.
        out: where to write the result, flat [P]; `.grad` may be views of it.

    Returns:
        result: [P] in the dtype of the gradients (`out` if given); for lists, one tensor for each parameter, in its shape and dtype.
        gram: float64 [n+1, n+1], the inner products of the task gradients and, last, the old direction.
        result_norm: float64 scalar, |result| before clipping.

    Raises:
        ValueError: unknown aggregation, tasks with different numbers of tensors, a parameter that no task reaches, sizes that do not
            add up to P, a `max_norm` that is not positive, or an `out` that does not fit.

    Source: "Preserving Gradient Harmony", OpenReview l0QAezg8HX.
    """
    columns = parameter_columns(gradients)
    check_sizes(columns, direction, angles, aggregation, max_norm, out)
    settings = {"mu": mu, "lam": lam, "alpha_steps": alpha_steps, "lr_inner": lr_inner, "aggregation": aggregation}
    flat = isinstance(gradients, Tensor)
    dtype = gradients.dtype if flat else direction.dtype
    result = torch.empty(direction.shape, dtype=dtype, device=direction.device) if out is None else out
    # Compiled code calls the operation even where it runs the reference: traced, each of its writes to a block would copy all of P.
    if _has_kernel(columns, direction) or (flat and torch.compiler.is_compiling()):
        rows = gradients if flat else _arena(columns)
        gram, norm = torch.ops.aime_fast.rgb_rotate_(rows, direction, angles, has_direction, result, *settings.values(), max_norm)
    else:
        gram, norm = rotate_reference_(columns, direction, angles, has_direction, settings, max_norm, result)
    if flat:
        return result, gram, norm
    like = [first_present(column) for column in columns]
    return [piece.view(g.shape).to(g.dtype) for piece, g in zip(result.split([g.numel() for g in like]), like)], gram, norm


@torch.no_grad()
def rgb_rotate(
    gradients: TaskGradients, direction: Tensor, angles: Tensor, has_direction: Tensor, **settings
) -> tuple[Tensor | list[Tensor], Tensor, Tensor, Tensor]:
    """`rgb_rotate_` on copies of the state: (result, new direction, new angles, result_norm). `settings` are its keyword arguments.

    Example:
        >>> g, settings = torch.randn(4, 1000), dict(mu=0.9, lam=1.0, alpha_steps=3, lr_inner=0.2, aggregation="norm_weighted")
        >>> result, d, angles, norm = rgb_rotate(g, torch.zeros(1000), torch.zeros(4), torch.tensor(False), **settings)
    """
    direction, angles, has_direction = direction.clone(), angles.clone(), has_direction.clone()
    result, _, norm = rgb_rotate_(gradients, direction, angles, has_direction, **settings)
    return result, direction, angles, norm
