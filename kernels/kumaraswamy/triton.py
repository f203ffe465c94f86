"""Triton kernels of `kernels.kumaraswamy`: sticks, weights and KL in one launch, all gradients in another.

A program holds a few rows of sticks as a tile [BLOCK_ROWS, KP], KP a power of two of at least K: column k < K - 1 is stick k, column
K - 1 the remainder of the stick. The quadrature of the KL adds an axis of 8 nodes and takes the 24 in three turns: two rows of 15
components are then 256 numbers for a program's 64 threads, 1,600 rows are 800 programs, and no lane idles on padded nodes.

In float32, sampling reads 12 bytes a stick, writes 4 for v and 8 for each of the K weights; the backward reads the inputs and the
gradients that exist, and writes 8 bytes a stick.

exp, log and the functions built on them are written out, for three reasons. Triton's interpreter has no libdevice. tl.exp is ex2.approx
of a rounded product on a GPU, which loses |x| / 2 units in the last place; it is used only where x itself is rounded as coarsely. And the
same polynomials give 1 - e^-t and log(1 + x) to full precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.kumaraswamy.reference import LARGE_T, NODES, SERIES_TERMS

_NODES = tl.constexpr(NODES)
_LANES = tl.constexpr(8)
_LARGE = tl.constexpr(LARGE_T)
_TERMS = tl.constexpr(SERIES_TERMS)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_BELOW_ONE = tl.constexpr(1 - torch.finfo(torch.float32).eps)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits: a product with an exponent is exact
_LN2_LOW = tl.constexpr(1.4286068203094172e-6)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, which the low bits of the sum then hold
_LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _exp_parts(x):
    """2^n, 2^-n, expm1(r) and expm1(-r), where x = n log 2 + r and |r| <= log(2) / 2. x is clamped to [-87, 87]: e^-88 underflows.

    The polynomial is a minimax fit, relative error 1.4e-8. The compiler removes results that a caller does not use.
    """
    x = tl.minimum(tl.maximum(x, -87.0), 87.0)
    shifted = x * _LOG2E + _ROUNDER
    n = shifted - _ROUNDER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    q = r * r
    odd = r + r * q * (0.1666654828264043 + q * 0.008366099911753078)
    even = q * (0.5 + q * (0.04166685488032076 + q * 0.001389824263055926))
    bits = shifted.to(tl.int32, bitcast=True)
    power = ((bits + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - bits) << 23).to(tl.float32, bitcast=True)
    return power, inverse, even + odd, even - odd


@triton.jit
def _exp_both(x):
    """e^x, e^-x and e^-x - 1."""
    power, inverse, p, q = _exp_parts(x)
    return power * p + power, inverse * q + inverse, inverse * q + (inverse - 1.0)


@triton.jit
def _log_near(x, d):
    """log x for normal x > 0, given d = x - 1 to full precision, which x itself may have lost. Minimax fit, relative error 5e-9."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F2AAAAB) >> 23  # x = 2^e m, m in [2/3, 4/3)
    f = tl.where(e == 0, d, (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0)
    series = 0.14005860035066894 + f * (-0.1218427515100096 + f * (0.13984480709359862 + f * -0.12891613759498344))
    series = 0.3333321597368226 + f * (-0.2499979767982597 + f * (0.20010406461369176 + f * (-0.16680486589684168 + f * series)))
    exponent = e.to(tl.float32)
    return exponent * _LN2_HIGH + (f + (f * f * (f * series - 0.5) + exponent * _LN2_LOW))


@triton.jit
def _log(x):
    return _log_near(x, x - 1.0)


@triton.jit
def _log1p(x):
    return _log_near(1.0 + x, x)


@triton.jit
def _l1me(t):
    """e^-t, 1 - e^-t and log(1 - e^-t) for t > 0."""
    power, _, p, _ = _exp_parts(-t)
    y = power * p + power
    w = (1.0 - power) - power * p
    return y, w, _log_near(w, -y)


@triton.jit
def _damped(x, y, w):
    """x / expm1(x), given y = e^-x and w = 1 - e^-x."""
    return x * y / w


@triton.jit
def _rho(t, y, w, z):
    """e^-t / ((1 - e^-t) |z|), z = log(1 - e^-t); the expansion where e^-t may underflow."""
    return tl.where(t > _LARGE, 1.0 + 0.5 * y, y / (w * tl.maximum(-z, _TINY)))


@triton.jit
def _psi_difference(x, d):
    """digamma(x + d) - digamma(x) for x, d > 0. Each term has the factor d, so a small d loses no precision."""
    near = 1.0 / (x * (x + d))
    for i in tl.static_range(1, 6):
        near += 1.0 / ((x + i) * (x + i + d))
    q = 1.0 / (x + 6.0)
    r = 1.0 / (x + 6.0 + d)
    first = d * q * r  # q - r
    square = first * (q + r)  # q^2 - r^2
    q2 = q * q
    r2 = r * r
    tail = 0.5 * first + square * (1 / 12 - (q2 + r2) * (1 / 120) + (q2 * q2 + q2 * r2 + r2 * r2) * (1 / 252))
    return d * near + _log1p(d * q) + tail


@triton.jit
def _trigamma_above_one(b):
    """trigamma(b + 1) for b > 0."""
    near = 1.0 / ((b + 1.0) * (b + 1.0))
    for j in tl.static_range(2, 7):
        near += 1.0 / ((b + j) * (b + j))
    r = 1.0 / (b + 7.0)
    r2 = r * r
    return near + r + 0.5 * r2 + r * r2 * (1 / 6 - r2 * (1 / 30 - r2 * (1 / 42)))


@triton.jit
def _stirling(x):
    """log Gamma(x) - (x - 1/2) log x + x - log(2 pi) / 2 for x >= 4."""
    q = 1.0 / x
    q2 = q * q
    return q * (1 / 12 - q2 * (1 / 360 - q2 * (1 / 1260 - q2 * (1 / 1680))))


@triton.jit
def _beta_function(x, b):
    """B(x, b). Both arguments are raised by 4, where Stirling's formula gives B without differences of large log-gammas."""
    above = x + b
    below = x * b
    for i in tl.static_range(1, 8):
        above *= x + b + i
    for i in tl.static_range(1, 4):
        below *= (x + i) * (b + i)
    x += 4.0
    b += 4.0
    log_beta = 0.5 * (_LOG_2PI + _log((x + b) / (x * b))) - x * _log1p(b / x) - b * _log1p(x / b)
    return above / below * tl.exp(log_beta + _stirling(x) + _stirling(b) - _stirling(x + b))


@triton.jit
def _skip_last(before1, last1, before2, last2):
    """Combine function of an exclusive cumulative sum: each half is (sum without its last element, last element)."""
    return before1 + last1 + before2, last2


@triton.jit
def _minus_log_uniform(u, at, mask):
    value = tl.load(u + at, mask=mask, other=0.5).to(tl.float32)
    return -_log(tl.minimum(tl.maximum(value, _TINY), _BELOW_ONE))


@triton.jit
def _node(nodes, turn, b):
    """Nodes t and weights W, both [BLOCK_ROWS, KP, LANES], of one turn of the quadrature."""
    lane = turn * _LANES + tl.arange(0, _LANES)
    t = tl.load(nodes + lane)[None, None, :]
    weight = tl.load(nodes + _NODES + lane)[None, None, :]
    beta = tl.maximum(b, 1.0)
    t = t * (1.0 / beta)[:, :, None]
    return t, weight * (b / beta)[:, :, None] * tl.exp((beta - b)[:, :, None] * t)


@triton.jit(do_not_specialize=["N"])
def sticks_kernel(
    log_a,  # [N, K-1], rows `stride_a` apart
    log_b,  # [N, K-1], rows `stride_b` apart
    u,  # [N, K-1] uniforms
    alpha,  # [N] or [N, K-1]; None without KL
    log_alpha,  # likewise, or None
    nodes,  # [2, 24] float32: nodes and weights
    v,  # [N, K-1]
    pi,  # [N, K]
    log_pi,  # [N, K]
    kl,  # [N, K-1]; None without KL
    stride_a,
    stride_b,
    N,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KL: tl.constexpr,  # None, "exact" or "series10"
    ALPHA_ROWS: tl.constexpr,  # whether alpha is [N]
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS  # offsets within a tile fit 32 bits
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, KP)[None, :]
    is_stick = (row >= 0) & (column < K - 1)
    mask = is_stick & (row < N - first)
    inside = (column < K) & (row < N - first)
    start = first * (K - 1)
    offset = row * (K - 1) + column
    la = tl.load(log_a + first * stride_a + row * stride_a + column, mask=mask, other=0.0).to(tl.float32)
    lb = tl.load(log_b + first * stride_b + row * stride_b + column, mask=mask, other=0.0).to(tl.float32)
    a, inverse_a, inverse_a_less_1 = _exp_both(la)
    b, inverse_b, _ = _exp_both(lb)
    t = tl.maximum(_minus_log_uniform(u, start + offset, mask) * inverse_b, _TINY)

    y, _, z = _l1me(t)
    lv = inverse_a * z
    sample, _, rest = _l1me(tl.maximum(-lv, _TINY))
    rest = tl.where(t > _LARGE, 0.5 * (y + lv) - la - t, rest)  # log(1 - v); -lv is e^(-la - t) there
    tl.store(v + start + offset, sample.to(v.dtype.element_ty), mask=mask)

    rest = tl.where(is_stick, rest, 0.0)
    before, _ = tl.associative_scan((tl.zeros_like(rest), rest), 1, _skip_last)
    weight = tl.where(is_stick, lv, 0.0) + before
    tl.store(log_pi + first * K + row * K + column, weight.to(log_pi.dtype.element_ty), mask=inside)
    tl.store(pi + first * K + row * K + column, tl.exp(weight).to(pi.dtype.element_ty), mask=inside)

    if KL is not None:
        at_alpha = first + row if ALPHA_ROWS else start + offset
        mean = tl.load(alpha + at_alpha, mask=mask, other=1.0).to(tl.float32)
        if log_alpha is None:  # noqa: SIM108 (only one of the branches can be compiled)
            log_mean = _log(mean)
        else:
            log_mean = tl.load(log_alpha + at_alpha, mask=mask, other=0.0).to(tl.float32)
        common = la + lb + inverse_a_less_1 * _psi_difference(1.0, b) - 1.0 - log_mean
        if KL == "exact":
            total = tl.zeros([BLOCK_ROWS, KP, _LANES], tl.float32)
            for turn in tl.static_range(_NODES // _LANES):
                t, weights = _node(nodes, turn, b)
                y, _, z = _l1me(t)
                _, w, _ = _l1me(-inverse_a[:, :, None] * z)
                total += weights * _log(w * a[:, :, None] / y)
            divergence = common + mean * inverse_b - (mean - 1.0) * (tl.sum(total, 2) - la)
        else:
            total = tl.zeros_like(la)
            for m in range(1, _TERMS + 1):
                total += _beta_function(m * inverse_a, b) * b / (m + a * b)
            divergence = common + inverse_b + (mean - 1.0) * total
        tl.store(kl + start + offset, divergence.to(kl.dtype.element_ty), mask=mask)


@triton.jit
def _load_gradient(gradient, start, offset, mask):
    return tl.load(gradient + start + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def sticks_backward_kernel(
    log_a,  # inputs as in the forward kernel
    log_b,
    u,
    alpha,
    log_alpha,
    nodes,
    grad_v,  # gradients of the outputs, in their shapes; None for an output that was not used
    grad_pi,
    grad_log_pi,
    grad_kl,
    to_log_a,  # gradients of the inputs, in their shapes
    to_log_b,
    to_alpha,  # [N] or [N, K-1]; None without KL
    to_log_alpha,  # likewise, or None
    stride_a,
    stride_b,
    N,
    K: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    KL: tl.constexpr,
    ALPHA_ROWS: tl.constexpr,  # whether alpha is [N]
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, KP)[None, :]
    is_stick = (row >= 0) & (column < K - 1)
    mask = is_stick & (row < N - first)
    inside = (column < K) & (row < N - first)
    start = first * (K - 1)
    offset = row * (K - 1) + column
    la = tl.load(log_a + first * stride_a + row * stride_a + column, mask=mask, other=0.0).to(tl.float32)
    lb = tl.load(log_b + first * stride_b + row * stride_b + column, mask=mask, other=0.0).to(tl.float32)
    a, inverse_a, inverse_a_less_1 = _exp_both(la)
    b, inverse_b, _ = _exp_both(lb)
    by_la = tl.zeros_like(la)
    by_lb = tl.zeros_like(la)

    if grad_v is not None or grad_pi is not None or grad_log_pi is not None:
        t = tl.maximum(_minus_log_uniform(u, start + offset, mask) * inverse_b, _TINY)
        y, w, z = _l1me(t)
        lv = inverse_a * z
        s = tl.maximum(-lv, _TINY)
        sample, w_sample, rest = _l1me(s)
        weight = tl.zeros_like(la)  # gradient with respect to log pi
        if grad_log_pi is not None:
            weight += _load_gradient(grad_log_pi, first * K, row * K + column, inside)
        if grad_pi is not None:
            rest = tl.where(t > _LARGE, 0.5 * (y + lv) - la - t, rest)
            rest = tl.where(is_stick, rest, 0.0)
            before, _ = tl.associative_scan((tl.zeros_like(rest), rest), 1, _skip_last)
            weight += tl.exp(tl.where(is_stick, lv, 0.0) + before) * _load_gradient(grad_pi, first * K, row * K + column, inside)
        at = weight  # with respect to log v
        if grad_v is not None:
            at += sample * _load_gradient(grad_v, start, offset, mask)
        by_la -= at * lv
        by_lb -= at * inverse_a * _damped(t, y, w)
        if grad_pi is not None or grad_log_pi is not None:
            after, _ = tl.associative_scan((tl.zeros_like(weight), weight), 1, _skip_last, reverse=True)  # with respect to log(1 - v)
            after *= _damped(s, sample, w_sample)
            by_la -= after
            by_lb += after * t * _rho(t, y, w, z)

    if KL is not None:
        slope = _load_gradient(grad_kl, start, offset, mask)
        at_alpha = first + row if ALPHA_ROWS else start + offset
        mean = tl.load(alpha + at_alpha, mask=mask, other=1.0).to(tl.float32)
        if KL == "exact":
            integral = tl.zeros([BLOCK_ROWS, KP, _LANES], tl.float32)
            integral_la = tl.zeros([BLOCK_ROWS, KP, _LANES], tl.float32)
            integral_lb = tl.zeros([BLOCK_ROWS, KP, _LANES], tl.float32)
            for turn in tl.static_range(_NODES // _LANES):
                t, weights = _node(nodes, turn, b)
                y, w, z = _l1me(t)
                s = -inverse_a[:, :, None] * z
                y_s, w_s, _ = _l1me(s)
                damped = _damped(s, y_s, w_s)
                remainder = _log(w_s * a[:, :, None] / y)
                integral += weights * remainder
                integral_la += weights * (1.0 - damped)
                by_nodes = t * (damped * _rho(t, y, w, z) - 1.0)
                integral_lb += weights * tl.where(b[:, :, None] >= 1.0, by_nodes, (1.0 - b[:, :, None] * t) * remainder)
            rest = tl.sum(integral, 2) - la - inverse_b
            rest_la = tl.sum(integral_la, 2) - 1.0
            rest_lb = tl.sum(integral_lb, 2)
            shared = mean * inverse_b
        else:
            rest = tl.zeros_like(la)
            rest_la = tl.zeros_like(la)
            rest_lb = tl.zeros_like(la)
            for m in range(1, _TERMS + 1):
                x = m * inverse_a
                share = a * b / (m + a * b)
                term = _beta_function(x, b) * b / (m + a * b)
                rest -= term
                rest_la -= term * (x * _psi_difference(x, b) - share)
                rest_lb -= term * (1.0 - b * _psi_difference(b, x) - share)
            shared = inverse_b
        by_la += slope * (1.0 - inverse_a * _psi_difference(1.0, b) - (mean - 1.0) * rest_la)
        by_lb += slope * (1.0 + inverse_a_less_1 * b * _trigamma_above_one(b) - shared - (mean - 1.0) * rest_lb)
        by_alpha = -slope * rest
        if log_alpha is None:
            by_alpha -= slope / mean
        if ALPHA_ROWS:
            line = first + tl.arange(0, BLOCK_ROWS)
            tl.store(to_alpha + line, tl.sum(tl.where(mask, by_alpha, 0.0), 1).to(to_alpha.dtype.element_ty), mask=line < N)
            if log_alpha is not None:
                tl.store(to_log_alpha + line, tl.sum(-slope, 1).to(to_log_alpha.dtype.element_ty), mask=line < N)
        else:
            tl.store(to_alpha + start + offset, by_alpha.to(to_alpha.dtype.element_ty), mask=mask)
            if log_alpha is not None:
                tl.store(to_log_alpha + start + offset, (0.0 - slope).to(to_log_alpha.dtype.element_ty), mask=mask)

    tl.store(to_log_a + start + offset, by_la.to(to_log_a.dtype.element_ty), mask=mask)
    tl.store(to_log_b + start + offset, by_lb.to(to_log_b.dtype.element_ty), mask=mask)
