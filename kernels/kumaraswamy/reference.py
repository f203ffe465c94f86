"""Kumaraswamy stick-breaking in log space, and KL(Kumaraswamy || Beta), in plain PyTorch.

With la = log a, lb = log b and l1me(t) = log(1 - e^-t), a sample from u ~ U(0, 1) is

    t = -log(u) / b        z = l1me(t) = log(v^a)        log v = z / a        log(1 - v) = l1me(-log v)
    log pi_k = log v_k + sum_{j<k} log(1 - v_j),         log pi_K = sum_j log(1 - v_j).

For large t, z = -e^-t underflows although log(1 - v) = log(-z / a) is an ordinary number, so there its expansion is used:
log(1 - v) = -la - t + e^-t / 2 - s / 2 with s = e^(-la - t). Over la, lb in [-5, 5] and every float u in (0, 1) all values and
gradients are then finite; (1 - u^(1/b))^(1/a) evaluated directly in float32 is exactly 0 or 1 on a quarter of such draws.

The KL needs L = E log(1 - v). The density of t is b e^(-bt). The control variate E t = 1/b makes the integrand bounded by |la|;
its limit -la at large t is taken out as well, and the remaining integrand C decays as e^-t:

    L = -1/b + S,    S = -la + E[C(t)],    C(t) = log(1 - v(t)) + t + la

With a small a, C is a step near t = log(1/a). For b < 1, nodes placed for the density b e^(-bt) are too sparse there, so they are
placed for beta e^(-beta t), beta = max(b, 1), with the weight (b / beta) e^((beta - b) t), which grows more slowly than C decays.
24 tanh-sinh nodes then give S within 3e-6 over the whole range (nodes placed for b alone: 5e-3).

    KL(Kuma(a, b) || Beta(1, alpha)) = la + lb - (1 - 1/a) H - 1 + 1/b - log alpha - (alpha - 1) L,   H = digamma(b + 1) + gamma.

The backward pass gets the inputs only and recomputes the sample. With R(x) = x / expm1(x), which is at most 1, s = -log v and
rho = e^-t / ((1 - e^-t) |z|), the gradients are

    d log v / dla = s                 d log v / dlb = -e^-la R(t)
    d log(1 - v) / dla = -R(s)        d log(1 - v) / dlb = t R(s) rho
    dS / dla = -1 + E[1 - R(s)]       dS / dlb = -E[t (1 - R(s) rho)] for b >= 1, and sum W (1 - b t) C for b < 1,

where W and t are the weights and nodes of the rule: for b >= 1 the nodes depend on b, for b < 1 the weights do.
    dKL / dla = 1 - e^-la H - (alpha - 1) dS / dla
    dKL / dlb = 1 + expm1(-la) b trigamma(b + 1) - alpha / b - (alpha - 1) dS / dlb.

The ten-term series of L in common use is badly biased: for (a, b, alpha) = (1, 1, 3) it gives a KL of 0.720 instead of 0.901,
and for (1, 0.1, 5) 15.0 instead of 45.1. It is kept as `method="series10"` for parity with AIME.
Its terms T_m = b B(x, b) / (m + a b), x = m / a, have

    d log T_m / dla = x (psi(x + b) - psi(x)) - a b / (m + a b)
    d log T_m / dlb = 1 - b (psi(x + b) - psi(b)) - a b / (m + a b).

Sources: Wasserman and Mateos, "Stabilizing the Kumaraswamy Distribution", arXiv 2410.00660 (log-space sampling); Nalisnick and
Smyth, "Stick-Breaking Variational Autoencoders", arXiv 1605.06197 (KL and its series); Takahasi and Mori, 1974 (tanh-sinh rule).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

KL_METHODS = ("exact", "series10")

LN2 = math.log(2.0)
EULER_GAMMA = 0.5772156649015329
LARGE_T = 15.0  # above it the expansion of log(1 - v) is exact to float32; e^-t is still far from underflow
NODES = 24  # of the tanh-sinh rule
REACH = 2.3  # the nodes lie in [-REACH, REACH] before the substitution
SERIES_TERMS = 10


def quadrature(dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """-log(u_i) and weights w_i [24] of the tanh-sinh rule on (0, 1). It returns the logarithm, because u_i itself may round to 1.

    The rule is computed on the device at each call: a table would be copied there, which a compiled or captured step must not do.
    """
    x = torch.arange(NODES, dtype=torch.float64, device=device) * (2 * REACH / (NODES - 1)) - REACH
    y = math.pi * torch.sinh(x)
    weights = torch.cosh(x) * torch.sigmoid(y) * torch.sigmoid(-y)
    return functional.softplus(-y).to(dtype), (weights / weights.sum()).to(dtype)  # normalised: a constant is integrated exactly


def l1me(t: Tensor) -> Tensor:
    """log(1 - e^-t) for t > 0, accurate at both ends, with a finite gradient on the branch that is not taken.

    For small t, 1 - e^-t = 2h / (1 + h) with h = tanh(t/2). expm1 would be inaccurate: Inductor compiles expm1(x) to exp(x) - 1 on a CPU,
    which cancels.
    """
    small = t < LN2
    h = torch.tanh(0.5 * torch.where(small, t, LN2))
    near = torch.log(2 * h / (1 + h))
    far = torch.log1p(-torch.exp(-torch.where(small, LN2, t)))
    return torch.where(small, near, far)


def _log_sticks(log_a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """log v and log(1 - v) of the sample with t = -log(u) / b > 0."""
    large = t > LARGE_T
    z = l1me(t)
    log_v = torch.exp(-log_a) * z
    usual = l1me(torch.where(large, LN2, -log_v))
    tail = torch.where(large, t, LARGE_T)
    expansion = -log_a - tail + 0.5 * torch.exp(-tail) - 0.5 * torch.exp(-log_a - tail)
    return log_v, torch.where(large, expansion, usual)


def stick_breaking(log_v: Tensor, log_rest: Tensor) -> Tensor:
    """log v_k and log(1 - v_k) [..., K-1] -> log pi [..., K], which sums to 1 by construction."""
    remaining = functional.pad(log_rest.cumsum(-1), (1, 0))  # [..., K]: log of the stick left before piece k
    return functional.pad(log_v, (0, 1)) + remaining


def _working(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float16 and bfloat16 to float32, in which they are computed."""
    return tuple(x if x.dtype in (torch.float32, torch.float64) else x.float() for x in tensors)


class Sticks(NamedTuple):
    """A sample of K - 1 stick proportions, the K mixture weights that they define, and the KL of each stick; all in one dtype."""

    v: Tensor  # [..., K-1], in [0, 1]
    pi: Tensor  # [..., K], sums to 1
    log_pi: Tensor  # [..., K]
    kl: Tensor | None  # [..., K-1], nats; None without an alpha


def _sample_t(la: Tensor, lb: Tensor, u: Tensor) -> Tensor:
    """t = -log(u) / b, finite and positive: torch.rand can return 0."""
    info = torch.finfo(la.dtype)
    return (-torch.log(u.to(la.dtype).clamp(info.tiny, 1 - info.eps)) * torch.exp(-lb)).clamp_min(info.tiny)


def kumaraswamy_sticks_reference(
    log_a: Tensor, log_b: Tensor, u: Tensor, alpha: Tensor | None = None, log_alpha: Tensor | None = None, kl: str = "exact"
) -> Sticks:
    """`kernels.kumaraswamy.kumaraswamy_sticks` in plain PyTorch."""
    dtype = log_a.dtype
    la, lb = _working(log_a, log_b)
    log_v, log_rest = _log_sticks(la, _sample_t(la, lb, u))
    log_pi = stick_breaking(log_v, log_rest)
    divergence = None if alpha is None else kumaraswamy_beta_kl(log_a, log_b, alpha, log_alpha, kl)
    return Sticks(log_v.exp().to(dtype), log_pi.exp().to(dtype), log_pi.to(dtype), divergence)


def kumaraswamy_log_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log E[v] = log(b B(1 + 1/a, b)), [...] -> [...]. Computed in float64: log-gammas of size 600 cancel."""
    a, b = torch.exp(log_a.double()), torch.exp(log_b.double())
    log_mean = torch.lgamma(1 + 1 / a) + torch.lgamma(1 + b) - torch.lgamma(1 + 1 / a + b)
    return log_mean.to(log_a.dtype)


def kumaraswamy_mean_sticks(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log pi [..., K] for v_k = E[v_k], [..., K-1] -> [..., K]. Deterministic (evaluation) mode uses it instead of a sample."""
    log_v = kumaraswamy_log_mean(log_a.double(), log_b.double())
    return stick_breaking(log_v, l1me(-log_v)).to(log_a.dtype)


def _log_rest_integral(log_a: Tensor, log_b: Tensor) -> Tensor:
    """S = E[log(1 - v)] + 1/b by quadrature, [...] -> [...]; see the module docstring."""
    nodes, weights = quadrature(log_a.dtype, log_a.device)
    b = torch.exp(log_b).unsqueeze(-1)
    beta = b.clamp_min(1.0)
    t = nodes / beta  # [..., 24]
    log_a = log_a.unsqueeze(-1)
    _, log_rest = _log_sticks(log_a, t)
    remainder = log_rest + t + log_a
    return (remainder * (b / beta) * torch.exp((beta - b) * t) * weights).sum(-1) - log_a.squeeze(-1)


def _log_rest_series(log_a: Tensor, log_b: Tensor) -> Tensor:
    """E[log(1 - v)] by its truncated series -b sum_m B(m/a, b) / (m + a b), [...] -> [...]."""
    m = torch.arange(1, SERIES_TERMS + 1, dtype=log_a.dtype, device=log_a.device)
    a, b = torch.exp(log_a).unsqueeze(-1), torch.exp(log_b).unsqueeze(-1)
    log_beta = torch.lgamma(m / a) + torch.lgamma(b) - torch.lgamma(m / a + b)
    return -(b * torch.exp(log_beta) / (m + a * b)).sum(-1)


def kumaraswamy_beta_kl(log_a: Tensor, log_b: Tensor, alpha: Tensor, log_alpha: Tensor | None = None, method: str = "exact") -> Tensor:
    """KL(Kumaraswamy(a, b) || Beta(1, alpha)), elementwise.

    The KL is linear in (alpha, log alpha). With `alpha` = E[alpha] and `log_alpha` = E[log alpha] the result is therefore *exactly*
    its expectation under q(alpha), without a sample of alpha.

    Args:
        log_a, log_b: [..., K-1].
        alpha: concentration of the Beta prior, or its mean; broadcasts to [..., K-1].
        log_alpha: mean of log alpha; log(alpha) when left out.
        method: "exact" (quadrature), or "series10", AIME's ten-term series, which is biased.

    Returns:
        [..., K-1] in nats, in the dtype of log_a.

    Raises:
        ValueError: unknown method.

    Source: Nalisnick and Smyth, arXiv 1605.06197.
    """
    if method not in KL_METHODS:
        raise ValueError(f"kumaraswamy_beta_kl: method {method!r} is unknown; choose one of {', '.join(KL_METHODS)}")
    dtype = log_a.dtype
    log_a, log_b, alpha = _working(log_a, log_b, alpha)
    log_alpha = torch.log(alpha) if log_alpha is None else _working(log_alpha)[0]
    harmonic = torch.special.digamma(torch.exp(log_b) + 1) + EULER_GAMMA
    common = log_a + log_b + torch.expm1(-log_a) * harmonic - 1 - log_alpha
    inverse_b = torch.exp(-log_b)
    if method == "series10":
        return (common + inverse_b - (alpha - 1) * _log_rest_series(log_a, log_b)).to(dtype)
    # 1/b of the KL and (alpha - 1)/b of -(alpha - 1) L are summed to alpha/b beforehand, so that large terms do not cancel.
    return (common + alpha * inverse_b - (alpha - 1) * _log_rest_integral(log_a, log_b)).to(dtype)


def _damped(x: Tensor) -> Tensor:
    """R(x) = x / expm1(x) for x >= 0; 1 at 0."""
    return torch.where(x > 0, x * torch.exp(-x) / -torch.expm1(-x), 1.0)


def _rest_slope(log_a: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log v, R(-log v) and t rho: the factors of the derivatives of log(1 - v)."""
    z = l1me(t)
    log_v = torch.exp(-log_a) * z
    rho = torch.where(t > LARGE_T, 1 + 0.5 * torch.exp(-t), torch.exp(-t) / (torch.expm1(-t) * z))
    return log_v, _damped(-log_v), t * rho


def _integral_gradients(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """dS/dla and dS/dlb of `_log_rest_integral`."""
    nodes, weights = quadrature(log_a.dtype, log_a.device)
    log_a, b = log_a.unsqueeze(-1), torch.exp(log_b).unsqueeze(-1)
    beta = b.clamp_min(1.0)
    t = nodes / beta  # [..., 24]
    weights = weights * (b / beta) * torch.exp((beta - b) * t)
    _, log_rest = _log_sticks(log_a, t)
    _, damped, t_rho = _rest_slope(log_a, t)
    by_log_b = torch.where(b >= 1, damped * t_rho - t, (1 - b * t) * (log_rest + t + log_a))
    return (weights * (1 - damped)).sum(-1) - 1, (weights * by_log_b).sum(-1)


def _series_gradients(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_log_rest_series` in log a and log b."""
    m = torch.arange(1, SERIES_TERMS + 1, dtype=log_a.dtype, device=log_a.device)
    a, b = torch.exp(log_a).unsqueeze(-1), torch.exp(log_b).unsqueeze(-1)
    x, share, psi = m / a, a * b / (m + a * b), torch.special.digamma
    term = torch.exp(torch.lgamma(x) + torch.lgamma(b) - torch.lgamma(x + b)) * b / (m + a * b)
    by_log_a = x * (psi(x + b) - psi(x)) - share
    by_log_b = 1 - b * (psi(x + b) - psi(b)) - share
    return -(term * by_log_a).sum(-1), -(term * by_log_b).sum(-1)


def backward_reference(
    log_a: Tensor, log_b: Tensor, u: Tensor, alpha: Tensor | None, log_alpha: Tensor | None, kl: str, *grads: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_a, log_b, alpha and log_alpha from those of the four outputs, by the formulas of the module docstring.

    Autograd does not record inside an operation of `torch.library`. None among `grads` counts as zero; the gradient of a missing
    input is empty.
    """
    la, lb = _working(log_a, log_b)
    *grads, grad_kl = grads
    v, pi, log_pi, _ = kumaraswamy_sticks_reference(la, lb, u)
    grad_v, grad_pi, grad_log_pi = (torch.zeros_like(x) if g is None else g.to(la.dtype) for x, g in zip((v, pi, log_pi), grads))
    t = _sample_t(la, lb, u)
    log_v, damped, t_rho = _rest_slope(la, t)
    weight = grad_log_pi + pi * grad_pi  # [..., K]: with respect to log pi
    after = weight.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # [..., K-1]: with respect to log(1 - v)
    at = weight[..., :-1] + v * grad_v  # with respect to log v
    by_log_a = -at * log_v - after * damped
    by_log_b = -at * torch.exp(-la) * _damped(t) + after * damped * t_rho
    by_alpha = by_log_alpha = None
    if grad_kl is not None:
        g, mean, b = grad_kl.to(la.dtype), alpha.to(la.dtype), torch.exp(lb)
        if kl == "exact":
            slopes, rest = _integral_gradients(la, lb), _log_rest_integral(la, lb) - 1 / b
        else:
            slopes, rest = _series_gradients(la, lb), _log_rest_series(la, lb)
        shared = mean if kl == "exact" else torch.ones_like(mean)  # 1/b of the series stays its own term
        harmonic = torch.special.digamma(b + 1) + EULER_GAMMA
        by_log_a = by_log_a + g * (1 - torch.exp(-la) * harmonic - (mean - 1) * slopes[0])
        curve = torch.expm1(-la) * b * torch.special.polygamma(1, b + 1)
        by_log_b = by_log_b + g * (1 + curve - shared / b - (mean - 1) * slopes[1])
        by_alpha = -g * (rest + (1 / mean if log_alpha is None else 0))
        by_log_alpha = -g
    gradients = [by_log_a.to(log_a.dtype), by_log_b.to(log_b.dtype)]
    for x, gradient in ((alpha, by_alpha), (log_alpha, by_log_alpha)):
        if x is None:
            gradients.append(log_a.new_empty(0))
        else:
            gradients.append(torch.zeros_like(x) if gradient is None else gradient.sum_to_size(x.shape).to(x.dtype))
    return tuple(x.contiguous() for x in gradients)
