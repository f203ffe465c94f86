"""Kumaraswamy sticks and their KL; the derivation is in `kernels.kumaraswamy.reference`, the kernels in `kernels.kumaraswamy.triton`.

The kernels run behind two operations: `aime_fast::kumaraswamy_sticks` and `aime_fast::kumaraswamy_sticks_backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.kumaraswamy.reference import (
    KL_METHODS,
    Sticks,
    backward_reference,
    kumaraswamy_beta_kl,
    kumaraswamy_log_mean,
    kumaraswamy_mean_sticks,
    kumaraswamy_sticks_reference,
)

__all__ = [
    "KL_METHODS",
    "Sticks",
    "kumaraswamy_beta_kl",
    "kumaraswamy_log_mean",
    "kumaraswamy_mean_sticks",
    "kumaraswamy_sticks",
    "kumaraswamy_sticks_reference",
]


def _has_kernel(log_a: Tensor) -> bool:
    """Whether the kernels run for these tensors; float64 runs the reference."""
    return use_triton(log_a) and log_a.dtype != torch.float64


@torch.library.custom_op("aime_fast::kumaraswamy_sticks", mutates_args=())
def _sticks_op(
    log_a: Tensor, log_b: Tensor, u: Tensor, alpha: Tensor | None, log_alpha: Tensor | None, kl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v, pi, log_pi and kl, which is empty without an alpha."""
    if _has_kernel(log_a):
        from kernels.kumaraswamy import launch  # here, so that machines without Triton have the reference

        return launch.forward(log_a, log_b, u, alpha, log_alpha, kl)
    sticks = kumaraswamy_sticks_reference(log_a, log_b, u, alpha, log_alpha, kl)
    return tuple(log_a.new_empty(0) if x is None else x.contiguous() for x in sticks)


@_sticks_op.register_fake
def _(log_a, log_b, u, alpha, log_alpha, kl):
    shape = log_a.shape
    weights = (*shape[:-1], shape[-1] + 1)
    return tuple(log_a.new_empty(s) for s in (shape, weights, weights, (0,) if alpha is None else shape))


@torch.library.custom_op("aime_fast::kumaraswamy_sticks_backward", mutates_args=())
def _sticks_backward_op(
    log_a: Tensor,
    log_b: Tensor,
    u: Tensor,
    alpha: Tensor | None,
    log_alpha: Tensor | None,
    kl: str,
    grad_v: Tensor | None,
    grad_pi: Tensor | None,
    grad_log_pi: Tensor | None,
    grad_kl: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_a, log_b, alpha and log_alpha; those of a missing alpha or log_alpha are empty."""
    arguments = (log_a, log_b, u, alpha, log_alpha, kl, grad_v, grad_pi, grad_log_pi, grad_kl)
    if _has_kernel(log_a):
        from kernels.kumaraswamy import launch

        return launch.backward(*arguments)
    return backward_reference(*arguments)


@_sticks_backward_op.register_fake
def _(log_a, log_b, u, alpha, log_alpha, kl, grad_v, grad_pi, grad_log_pi, grad_kl):
    return tuple(log_a.new_empty(0) if x is None else x.new_empty(x.shape) for x in (log_a, log_b, alpha, log_alpha))


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.kl = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):
    _, _, _, alpha, log_alpha = tensors = ctx.saved_tensors
    grads = grads if alpha is not None else (*grads[:-1], None)
    to_log_a, to_log_b, to_alpha, to_log_alpha = torch.ops.aime_fast.kumaraswamy_sticks_backward(*tensors, ctx.kl, *grads)
    return to_log_a, to_log_b, None, None if alpha is None else to_alpha, None if log_alpha is None else to_log_alpha, None


_sticks_op.register_autograd(_backward, setup_context=_save_inputs)


def kumaraswamy_sticks(
    log_a: Tensor, log_b: Tensor, u: Tensor, alpha: Tensor | None = None, log_alpha: Tensor | None = None, kl: str = "exact"
) -> Sticks:
    """Sample v_k ~ Kumaraswamy(a_k, b_k), break a stick of length 1 at them, and compute KL(q(v_k) || Beta(1, alpha)).

    The kernels take one launch for the forward and one for the backward, which saves nothing but the inputs.

    Args:
        log_a, log_b: [..., K-1], float32, bfloat16 or float16, computed in float32; or float64. Made for the range [-5, 5].
        u: uniform randoms in [0, 1] of the same shape. P(v < x) = 1 - u(x), so a large u gives a small v.
        alpha: concentration of the Beta prior, or its mean; broadcasts to [..., K-1]. No KL without it.
        log_alpha: mean of log alpha; log(alpha) when left out. With the two means the KL is exactly its expectation under q(alpha).
        kl: "exact" (quadrature), or "series10", AIME's ten-term series, which is biased.

    Returns:
        `Sticks` in the dtype of log_a, differentiable in log_a, log_b, alpha and log_alpha (reparameterised).

    Raises:
        ValueError: shapes that do not agree, an unknown kl, log_alpha without alpha.

    Sources: Wasserman and Mateos, arXiv 2410.00660; Nalisnick and Smyth, arXiv 1605.06197.

    Example:
        >>> log_a, log_b = torch.zeros(2, 160, 7).unbind(0)
        >>> sticks = kumaraswamy_sticks(log_a, log_b, torch.rand(160, 7), alpha=torch.ones(160, 1))
    """
    if log_b.shape != log_a.shape or log_a.shape[-1:] in ((), (0,)):
        raise ValueError(f"kumaraswamy_sticks: log_a {list(log_a.shape)} and log_b {list(log_b.shape)} must both be [..., K-1], K > 1")
    if u.shape != log_a.shape or not u.is_floating_point():
        raise ValueError(f"kumaraswamy_sticks: u is {u.dtype} {list(u.shape)}; expected uniforms {list(log_a.shape)}")
    if kl not in KL_METHODS:
        raise ValueError(f"kumaraswamy_sticks: kl {kl!r} is unknown; choose one of {', '.join(KL_METHODS)}")
    if log_alpha is not None and alpha is None:
        raise ValueError("kumaraswamy_sticks: log_alpha needs alpha")
    for name, x in (("alpha", alpha), ("log_alpha", log_alpha)):
        if x is not None and (x.dim() > log_a.dim() or any(n not in (1, m) for n, m in zip(x.shape[::-1], log_a.shape[::-1]))):
            raise ValueError(f"kumaraswamy_sticks: {name} {list(x.shape)} does not broadcast to {list(log_a.shape)}")
    if not _has_kernel(log_a):
        return kumaraswamy_sticks_reference(log_a, log_b, u, alpha, log_alpha, kl)
    *sticks, divergence = torch.ops.aime_fast.kumaraswamy_sticks(log_a, log_b, u, alpha, log_alpha, kl)
    return Sticks(*sticks, None if alpha is None else divergence)
