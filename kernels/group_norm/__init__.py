"""GroupNorm and SiLU in one; the mathematics is in `kernels.group_norm.reference`, the kernels in `kernels.group_norm.triton`.

The kernels run behind two operations: `aime_fast::group_norm_silu` and `aime_fast::group_norm_silu_backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.group_norm.reference import EPS, backward_reference, check_shapes, group_norm_silu_reference

__all__ = ["EPS", "group_norm_silu", "group_norm_silu_reference"]


def _has_kernel(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether the kernels run for these tensors; they take neither float64 nor an empty batch."""
    return (
        use_triton(x)
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight.dtype == bias.dtype == torch.float32
        and x.numel() > 0
    )


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("aime_fast::group_norm_silu", mutates_args=())
def _norm_op(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, channels last; mean and rstd [N, G]."""
    check_shapes(x, weight, bias, groups)
    if _has_kernel(x, weight, bias):
        from kernels.group_norm import launch  # here, so that machines without Triton have the reference

        return launch.forward(x, weight, bias, groups, eps)
    y = group_norm_silu_reference(x, weight, bias, groups, eps).contiguous(memory_format=torch.channels_last)
    grouped = x.to(_statistics_dtype(x)).reshape(x.shape[0], groups, x[0:1].numel() // groups)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    return y, mean, torch.rsqrt(variance + eps)


@_norm_op.register_fake
def _(x, weight, bias, groups, eps):
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=_statistics_dtype(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd


@torch.library.custom_op("aime_fast::group_norm_silu_backward", mutates_args=())
def _norm_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x, channels last, and of weight and bias in one tensor [2, C]."""
    if _has_kernel(x, weight, bias):
        from kernels.group_norm import launch

        return launch.backward(grad, x, weight, bias, mean, rstd, groups)
    to_x, affine = backward_reference(grad, x, weight, bias, mean, rstd, groups)
    return to_x.clone(memory_format=torch.channels_last), affine


@_norm_backward_op.register_fake
def _(grad, x, weight, bias, mean, rstd, groups):
    return torch.empty_like(x, memory_format=torch.channels_last), weight.new_empty((2, x.shape[1]))


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.groups, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _mean, _rstd):
    if grad is None:
        return None, None, None, None, None
    to_x, affine = torch.ops.aime_fast.group_norm_silu_backward(grad, *ctx.saved_tensors, ctx.groups)
    return to_x, *affine.unbind(), None, None


_norm_op.register_autograd(_backward, setup_context=_save)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = EPS) -> Tensor:
    """silu(GroupNorm(x)): one launch forward, one backward and a small sum, for frames whose channels are last in memory.

    The backward saves x and the two statistics of each group, nothing else. Autocast does not change the dtype.

    Args:
        x: [N, C, H, W], any float dtype. The kernels take fp32, bf16 and fp16, and copy x where channels are not last in memory.
        weight, bias: [C], fp32 for the kernels, which run the statistics and everything else in fp32.
        groups: G; channels g C / G to (g + 1) C / G - 1 of a frame share their mean and variance.
        eps: added to the variance.

    Returns:
        y: [N, C, H, W] in the dtype of x, differentiable in x, weight and bias. The kernels write channels last; the reference,
        which runs for float64, on a CPU and for no elements, keeps the layout that PyTorch gives it.

    Raises:
        ValueError: shapes that do not fit, groups that do not divide the channels, a dtype that is not a float.

    Sources: Wu and He, arXiv 1803.08494; Hendrycks and Gimpel, arXiv 1606.08415.

    Example:
        >>> x = torch.randn(40, 48, 16, 16).to(memory_format=torch.channels_last)
        >>> y = group_norm_silu(x, torch.ones(48), torch.zeros(48), groups=8)
    """
    check_shapes(x, weight, bias, groups)
    if _has_kernel(x, weight, bias):
        return torch.ops.aime_fast.group_norm_silu(x, weight, bias, groups, eps)[0]
    return group_norm_silu_reference(x, weight, bias, groups, eps)
