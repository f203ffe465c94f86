"""Kumaraswamy stick-breaking in log space, and KL(Kumaraswamy || Beta).

With la = log a, lb = log b and l1me(t) = log(1 - e^-t), a sample from u ~ U(0, 1) is

    t = -log(u) / b        z = l1me(t) = log(v^a)        log v = z / a        log(1 - v) = l1me(-log v)
    log pi_k = log v_k + sum_{j<k} log(1 - v_j),         log pi_K = sum_j log(1 - v_j)
    log q(v) = la + lb + (a - 1) log v + (b - 1) log(u) / b,     because log(1 - v^a) = log(u) / b.

For large t, z = -e^-t underflows although log(1 - v) = log(-z / a) is an ordinary number, so there its expansion is used:
log(1 - v) = -la - t + e^-t / 2 - s / 2 with s = e^(-la - t). Over la, lb in [-5, 5] and every float u in (0, 1) all values and
gradients are then finite; (1 - u^(1/b))^(1/a) taken literally in float32 is exactly 0 or 1 on a quarter of such draws.

The KL needs L = E log(1 - v). In terms of t, whose density is b e^(-bt), the control variate E t = 1/b makes the integrand
bounded by |la|, and its limit -la at large t comes out as well, so that what is left falls as e^-t:

    L = -1/b + S,    S = -la + E[C(t)],    C(t) = log(1 - v(t)) + t + la

With a small a, C is a step near t = log(1/a), and for b < 1 nodes laid for the density b e^(-bt) would stride over it; so they
are laid for beta e^(-beta t), beta = max(b, 1), with the weight (b / beta) e^((beta - b) t), which C outweighs. 24 tanh-sinh
nodes then give S within 3e-6 over the whole range (nodes laid for b alone: 5e-3).

    KL(Kuma(a, b) || Beta(1, alpha)) = la + lb - (1 - 1/a) H - 1 + 1/b - log alpha - (alpha - 1) L,   H = digamma(b + 1) + gamma.

The ten-term series of L in common use is badly biased: for (a, b, alpha) = (1, 1, 3) it gives a KL of 0.720 where 0.901 is right,
and for (1, 0.1, 5) 15.0 where 45.1 is right. It is kept as `method="series10"` for parity with AIME.

Sources: Wasserman and Mateos, "Stabilizing the Kumaraswamy Distribution", arXiv 2410.00660 (log-space sampling); Nalisnick and
Smyth, "Stick-Breaking Variational Autoencoders", arXiv 1605.06197 (KL and its series); Takahasi and Mori, 1974 (tanh-sinh rule).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_LN2 = math.log(2.0)
_EULER_GAMMA = 0.5772156649015329
_LARGE_T = 15.0  # from here on the expansion of log(1 - v) is exact to float32, and e^-t is still far from underflow


def _tanh_sinh(nodes: int, reach: float) -> tuple[list[float], list[float]]:
    """-log(u_i) and weights w_i of the tanh-sinh rule on (0, 1); the logarithm is taken where u_i itself would round to 1."""
    step = 2 * reach / (nodes - 1)
    abscissae = [-reach + step * i for i in range(nodes)]
    stretched = [math.pi * math.sinh(x) for x in abscissae]
    minus_log_u = [math.log1p(math.exp(-y)) if y > -30 else -y + math.log1p(math.exp(y)) for y in stretched]
    weights = [step * math.pi * math.cosh(x) / ((1 + math.exp(-y)) * (1 + math.exp(y))) for x, y in zip(abscissae, stretched)]
    return minus_log_u, [w / math.fsum(weights) for w in weights]  # normalised: a constant is integrated exactly


_MINUS_LOG_U, _WEIGHTS = _tanh_sinh(24, 2.3)


def l1me(t: Tensor) -> Tensor:
    """log(1 - e^-t) for t > 0, accurate at both ends, with a finite gradient on the branch that is not taken.

    For small t it takes 1 - e^-t = 2h / (1 + h), h = tanh(t/2): Inductor compiles expm1(x) to exp(x) - 1 on a CPU, which leaves a
    small t no digits.
    """
    small = t < _LN2
    h = torch.tanh(0.5 * torch.where(small, t, _LN2))
    near = torch.log(2 * h / (1 + h))
    far = torch.log1p(-torch.exp(-torch.where(small, _LN2, t)))
    return torch.where(small, near, far)


def _log_sticks(log_a: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """log v and log(1 - v) of the sample with t = -log(u) / b > 0."""
    large = t > _LARGE_T
    z = l1me(t)
    log_v = torch.exp(-log_a) * z
    usual = l1me(torch.where(large, _LN2, -log_v))
    tail = torch.where(large, t, _LARGE_T)
    expansion = -log_a - tail + 0.5 * torch.exp(-tail) - 0.5 * torch.exp(-log_a - tail)
    return log_v, torch.where(large, expansion, usual)


def stick_breaking(log_v: Tensor, log_rest: Tensor) -> Tensor:
    """log v_k and log(1 - v_k) [..., K-1] -> log pi [..., K], which sums to 1 by construction."""
    remaining = functional.pad(log_rest.cumsum(-1), (1, 0))  # [..., K]: log of the stick left before piece k
    return functional.pad(log_v, (0, 1)) + remaining


def _working(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float16 and bfloat16 are worked out in float32."""
    return tuple(x if x.dtype in (torch.float32, torch.float64) else x.float() for x in tensors)


def kumaraswamy_sticks(log_a: Tensor, log_b: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample v_k ~ Kumaraswamy(a_k, b_k) by inversion and break a stick of length 1 with them.

    Args:
        log_a, log_b: [..., K-1], any float dtype; made for the range [-5, 5].
        u: uniform randoms in (0, 1), of the same shape. P(v < x) = 1 - u(x), so a large u gives a small v.

    Returns:
        log_v: [..., K-1], differentiable in log_a and log_b (reparameterised).
        log_pi: [..., K], logarithm of the mixture weights.
        log_q: [..., K-1], log density of each v_k under its own Kumaraswamy.

    Example:
        >>> log_v, log_pi, log_q = kumaraswamy_sticks(torch.zeros(160, 7), torch.zeros(160, 7), torch.rand(160, 7))
    """
    dtype = log_a.dtype
    log_a, log_b, u = _working(log_a, log_b, u)
    t = (-torch.log(u) * torch.exp(-log_b)).clamp_min(torch.finfo(u.dtype).tiny)
    log_v, log_rest = _log_sticks(log_a, t)
    log_q = log_a + log_b + torch.expm1(log_a) * log_v - torch.expm1(log_b) * t
    return log_v.to(dtype), stick_breaking(log_v, log_rest).to(dtype), log_q.to(dtype)


def kumaraswamy_log_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log E[v] = log(b B(1 + 1/a, b)), [...] -> [...]. Worked out in float64: log-gammas of size 600 cancel."""
    a, b = torch.exp(log_a.double()), torch.exp(log_b.double())
    log_mean = torch.lgamma(1 + 1 / a) + torch.lgamma(1 + b) - torch.lgamma(1 + 1 / a + b)
    return log_mean.to(log_a.dtype)


def kumaraswamy_mean_sticks(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log pi [..., K] of the sticks v_k = E[v_k]: what deterministic (evaluation) mode uses in place of a sample."""
    log_v = kumaraswamy_log_mean(log_a.double(), log_b.double())
    return stick_breaking(log_v, l1me(-log_v)).to(log_a.dtype)


def _log_rest_integral(log_a: Tensor, log_b: Tensor) -> Tensor:
    """S = E[log(1 - v)] + 1/b by quadrature, [...] -> [...]; the module's docstring derives it."""
    nodes = torch.tensor(_MINUS_LOG_U, dtype=log_a.dtype, device=log_a.device)
    weights = torch.tensor(_WEIGHTS, dtype=log_a.dtype, device=log_a.device)
    b = torch.exp(log_b).unsqueeze(-1)
    beta = b.clamp_min(1.0)
    t = nodes / beta  # [..., 24]
    log_a = log_a.unsqueeze(-1)
    _, log_rest = _log_sticks(log_a, t)
    remainder = log_rest + t + log_a
    return (remainder * (b / beta) * torch.exp((beta - b) * t) * weights).sum(-1) - log_a.squeeze(-1)


def _log_rest_series(log_a: Tensor, log_b: Tensor, terms: int = 10) -> Tensor:
    """E[log(1 - v)] by its truncated series -b sum_m B(m/a, b) / (m + a b), [...] -> [...]."""
    m = torch.arange(1, terms + 1, dtype=log_a.dtype, device=log_a.device)
    a, b = torch.exp(log_a).unsqueeze(-1), torch.exp(log_b).unsqueeze(-1)
    log_beta = torch.lgamma(m / a) + torch.lgamma(b) - torch.lgamma(m / a + b)
    return -(b * torch.exp(log_beta) / (m + a * b)).sum(-1)


def kumaraswamy_beta_kl(log_a: Tensor, log_b: Tensor, alpha: Tensor, log_alpha: Tensor | None = None, method: str = "exact") -> Tensor:
    """KL(Kumaraswamy(a, b) || Beta(1, alpha)), elementwise.

    It is linear in (alpha, log alpha). With `alpha` = E[alpha] and `log_alpha` = E[log alpha] the result is therefore *exactly*
    its expectation under q(alpha), without a sample of alpha.

    Args:
        log_a, log_b: [..., K-1].
        alpha: concentration of the Beta prior, or its mean; broadcasts to [..., K-1].
        log_alpha: mean of log alpha; log(alpha) when left out.
        method: "exact" (quadrature), or "series10", AIME's ten-term series, which is biased.

    Returns:
        [..., K-1] in nats; in the dtype of log_a.

    Raises:
        ValueError: unknown method.
    """
    if method not in ("exact", "series10"):
        raise ValueError(f"kumaraswamy_beta_kl: method {method!r} is unknown; choose 'exact' or 'series10'")
    dtype = log_a.dtype
    log_a, log_b, alpha = _working(log_a, log_b, alpha)
    log_alpha = torch.log(alpha) if log_alpha is None else _working(log_alpha)[0]
    harmonic = torch.special.digamma(torch.exp(log_b) + 1) + _EULER_GAMMA
    common = log_a + log_b + torch.expm1(-log_a) * harmonic - 1 - log_alpha
    inverse_b = torch.exp(-log_b)
    if method == "series10":
        return (common + inverse_b - (alpha - 1) * _log_rest_series(log_a, log_b)).to(dtype)
    # 1/b of the KL and (alpha - 1)/b of -(alpha - 1) L join to alpha/b, so the large terms never cancel.
    return (common + alpha * inverse_b - (alpha - 1) * _log_rest_integral(log_a, log_b)).to(dtype)
