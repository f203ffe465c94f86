"""Kumaraswamy sticks and their KL over the whole range of the parameters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import kstest

from kernels.kumaraswamy import (
    kumaraswamy_beta_kl,
    kumaraswamy_log_mean,
    kumaraswamy_mean_sticks,
    kumaraswamy_sticks,
    kumaraswamy_sticks_reference,
)

log_parameter = st.floats(-5, 5)


def draws(seed, sticks=7, rows=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    log_a, log_b = (torch.rand(2, rows, sticks, generator=generator, dtype=dtype) * 10 - 5).unbind(0)
    u = torch.rand(rows, sticks, generator=generator, dtype=dtype)
    info = torch.finfo(dtype)
    u.view(-1)[:4] = torch.tensor([info.tiny, 1e-20, 0.5, 1 - info.eps], dtype=dtype)  # the ends of the range in every example
    return log_a, log_b, u.clamp(info.tiny, 1 - info.eps)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
def test_weights_sum_to_one_and_everything_is_finite(seed, dtype):
    log_a, log_b, u = draws(seed, dtype=dtype)
    log_a.requires_grad_()
    log_b.requires_grad_()
    sticks = kumaraswamy_sticks(log_a, log_b, u, torch.tensor(2.0, dtype=dtype))
    torch.testing.assert_close(sticks.pi.sum(-1), torch.ones(len(u), dtype=dtype), atol=3e-6, rtol=0)
    for value in sticks:
        assert value.dtype == dtype
        assert torch.isfinite(value).all()
        for gradient in torch.autograd.grad(value.sum(), (log_a, log_b), retain_graph=True):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("corner", [(a, b, u) for a in (-5.0, 0.0, 5.0) for b in (-5.0, 0.0, 5.0) for u in (1.2e-38, 0.3, 1 - 1.2e-7)])
def test_float32_agrees_with_float64(corner):
    def run(dtype):
        log_a, log_b, u = (torch.tensor([x], dtype=torch.float32).to(dtype).requires_grad_() for x in corner)
        v, _, log_pi, _ = kumaraswamy_sticks(log_a, log_b, u.detach())
        outputs = [log_pi[0], log_pi[1]]
        gradients = [g for y in outputs for g in torch.autograd.grad(y, (log_a, log_b), retain_graph=True)]
        return torch.stack([v[0], *outputs]).double(), torch.cat(gradients).double()

    for low, high in zip(run(torch.float32), run(torch.float64)):
        torch.testing.assert_close(low, high, rtol=1e-4, atol=2e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_gradients_against_finite_differences(seed):
    log_a, log_b, u = draws(seed, sticks=2, rows=3, dtype=torch.float64)
    log_a, log_b, u = log_a / 2, log_b / 2, 0.02 + 0.96 * u
    inputs = (log_a.requires_grad_(), log_b.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: kumaraswamy_sticks_reference(a, b, u)[:3], inputs, rtol=1e-4)
    assert torch.autograd.gradcheck(lambda a, b: kumaraswamy_beta_kl(a, b, torch.tensor(2.5).double()), inputs, rtol=1e-4)


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 5.0), (0.2, 3.0)])
def test_samples_follow_the_distribution(a, b):
    u = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_a, log_b = torch.full_like(u, math.log(a)), torch.full_like(u, math.log(b))
    drawn = kumaraswamy_sticks(log_a, log_b, u).v
    assert kstest(drawn.flatten().numpy(), lambda v: 1 - (1 - v**a) ** b).pvalue > 0.01
    mean = kumaraswamy_log_mean(log_a[0], log_b[0]).exp().item()
    assert mean == pytest.approx(drawn.mean().item(), abs=0.02)


@settings(deadline=None, max_examples=25)
@given(log_parameter, log_parameter)
def test_mean_sticks(log_a, log_b):
    la, lb = (torch.full((5,), x, dtype=torch.float32, requires_grad=True) for x in (log_a, log_b))
    log_pi = kumaraswamy_mean_sticks(la, lb)
    assert torch.isfinite(log_pi).all()
    assert log_pi.exp().sum().item() == pytest.approx(1, abs=1e-5)
    log_pi.sum().backward()
    assert torch.isfinite(la.grad).all()
    assert torch.isfinite(lb.grad).all()


def numerical_kl(log_a, log_b, alpha):
    """KL(Kumaraswamy || Beta(1, alpha)) by adaptive integration over y = log t, where t = -log(u) / b has density b e^(-bt)."""
    a, b = math.exp(log_a), math.exp(log_b)

    def log_ratio(t):
        z = math.log(-math.expm1(-t)) if t < math.log(2) else math.log1p(-math.exp(-t))
        log_v = z / a
        s = -log_v
        log_rest = -log_a - t if s < 1e-12 else (math.log(-math.expm1(-s)) if s < math.log(2) else math.log1p(-math.exp(-s)))
        log_q = log_a + log_b + (a - 1) * log_v - (b - 1) * t
        return log_q - math.log(alpha) - (alpha - 1) * log_rest

    def integrand(y):
        t = math.exp(y)
        return log_ratio(t) * math.exp(-b * t) * b * t

    top = math.log(60 / b)
    return sum(quad(integrand, top - 8 * i - 8, top - 8 * i, limit=200, epsabs=1e-10)[0] for i in range(5))


@settings(deadline=None, max_examples=60)
@given(log_parameter, log_parameter, st.floats(0.1, 20))
def test_kl_against_numerical_integration(log_a, log_b, alpha):
    expected = numerical_kl(log_a, log_b, alpha)
    exact, single = (
        kumaraswamy_beta_kl(*(torch.tensor(x, dtype=dtype) for x in (log_a, log_b, alpha))).item()
        for dtype in (torch.float64, torch.float32)
    )
    assert exact == pytest.approx(expected, abs=1e-5 * (1 + alpha), rel=1e-6)
    assert single == pytest.approx(expected, abs=1e-4 * (1 + alpha), rel=1e-5)
    assert exact > -1e-4


@pytest.mark.parametrize(("a", "b", "alpha", "exact", "series"), [(1, 1, 3, 0.901, 0.720), (1, 0.1, 5, 45.1, 15.0)])
def test_kl_exact_and_series(a, b, alpha, exact, series):
    log_a, log_b, alpha = (torch.tensor(x, dtype=torch.float64) for x in (math.log(a), math.log(b), float(alpha)))
    assert kumaraswamy_beta_kl(log_a, log_b, alpha).item() == pytest.approx(exact, rel=2e-3)
    assert kumaraswamy_beta_kl(log_a, log_b, alpha, method="series10").item() == pytest.approx(series, rel=2e-3)
    with pytest.raises(ValueError, match="series11"):
        kumaraswamy_beta_kl(log_a, log_b, alpha, method="series11")


def test_kl_with_moments_is_the_expectation_under_gamma():
    alpha = torch.distributions.Gamma(3.0, 2.0)
    values = alpha.sample((200_000,)).double()
    log_a, log_b = torch.tensor(0.4).double(), torch.tensor(-0.3).double()
    moments = kumaraswamy_beta_kl(log_a, log_b, values.mean(), values.log().mean())
    torch.testing.assert_close(moments, kumaraswamy_beta_kl(log_a, log_b, values).mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kl", ["exact", "series10"])
@pytest.mark.parametrize("log_alpha", [True, False])
def test_backward_formulas(kl, log_alpha):
    log_a, log_b, u = draws(1, sticks=3, rows=5, dtype=torch.float64)
    alpha = torch.linspace(0.3, 4, 5, dtype=torch.float64)[:, None]
    inputs = [x.requires_grad_() for x in (log_a / 2, log_b / 2, alpha, *([alpha.log() - 0.1] if log_alpha else []))]
    u = 0.02 + 0.96 * u

    def through_op(log_a, log_b, alpha, log_alpha=None):
        return torch.ops.aime_fast.kumaraswamy_sticks(log_a, log_b, u, alpha, log_alpha, kl)

    assert torch.autograd.gradcheck(through_op, inputs, rtol=1e-4)
    # Over the whole range finite differences are too coarse; there the gradients are compared with autograd of the reference.
    log_a, log_b, u = (x.requires_grad_() for x in draws(2, sticks=5, rows=40, dtype=torch.float64))
    alpha = torch.rand(40, 1, dtype=torch.float64).mul(9).add(0.1).requires_grad_()
    inputs = (log_a, log_b, alpha, *([(alpha.detach().log() - 0.1).requires_grad_()] if log_alpha else []))
    arguments = (log_a, log_b, u.detach(), *inputs[2:], *([] if log_alpha else [None]), kl)
    outputs = [f(*arguments) for f in (kumaraswamy_sticks_reference, torch.ops.aime_fast.kumaraswamy_sticks)]
    weights = [torch.randn_like(x) for x in outputs[0]]
    ours, theirs = (torch.autograd.grad(sum((x * w).sum() for x, w in zip(o, weights)), inputs) for o in outputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-6)


def test_operators_are_sound():
    log_a, log_b, u = draws(3, sticks=3, rows=4)
    inputs = (log_a.requires_grad_(), log_b.requires_grad_(), u)
    alpha = torch.full((4, 1), 2.0, requires_grad=True)
    for moments in ((None, None), (alpha, None), (alpha, torch.zeros(4, 3, requires_grad=True))):
        torch.library.opcheck(torch.ops.aime_fast.kumaraswamy_sticks, (*inputs, *moments, "exact"))
        grads = (None, None, torch.ones(4, 4), None if moments[0] is None else torch.ones(4, 3))
        torch.library.opcheck(
            torch.ops.aime_fast.kumaraswamy_sticks_backward,
            (*(x if x is None else x.detach() for x in (*inputs, *moments)), "exact", *grads),
        )


def test_arguments_that_do_not_fit_are_named():
    x = torch.zeros(3, 4)
    for arguments, message in [
        ((x, x[:2], x), r"log_b \[2, 4\]"),
        ((x[:, :0], x[:, :0], x[:, :0]), r"log_a \[3, 0\]"),
        ((x, x, x[:, :3]), r"float32 \[3, 3\]"),
        ((x, x, torch.tensor([1, 2])), r"int64 \[2\]"),
        ((x, x, x, x, None, "series11"), "series11"),
        ((x, x, x, None, x), "needs alpha"),
        ((x, x, x, torch.zeros(3)), r"alpha \[3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            kumaraswamy_sticks(*arguments)


def test_compiles_whole():
    log_a, log_b, u = draws(0, rows=8)

    def both(log_a, log_b, u):
        return kumaraswamy_sticks(log_a, log_b, u, torch.tensor(2.0))

    inputs = (log_a.requires_grad_(), log_b.requires_grad_())
    compiled, eager = torch.compile(both, fullgraph=True)(log_a, log_b, u), both(log_a, log_b, u)
    for ours, theirs in zip(compiled, eager):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(sum(x.sum() for x in outputs), inputs) for outputs in (compiled, eager))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
