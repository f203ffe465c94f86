"""Stick-breaking and Gamma heads of the generative prior."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aime_fast.generative_prior.gamma_posterior import GammaPosterior
from aime_fast.generative_prior.stick_breaking import AdaptiveStickBreaking, get_effective_components


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 15), st.floats(0, 1e4), st.booleans(), st.integers(0, 2**31))
def test_weights_are_a_distribution_whatever_the_features(components, scale, sample, seed):
    torch.manual_seed(seed)
    sticks = AdaptiveStickBreaking(6, components)
    features = (torch.randn(3, 2, 6) * scale).requires_grad_()
    out = sticks(features, sample=sample)
    assert out.pi.shape == out.log_pi.shape == (3, 2, components)
    assert out.v.shape == out.log_a.shape == (3, 2, components - 1)
    torch.testing.assert_close(out.pi.sum(-1), torch.ones(3, 2), atol=1e-5, rtol=0)
    assert torch.isfinite(out.log_pi).all()
    assert out.log_a.abs().max() <= 5
    assert out.log_b.abs().max() <= 5
    out.log_pi.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in [features, *sticks.parameters()])


def test_starts_uniform_in_expectation():
    torch.manual_seed(0)
    sticks = AdaptiveStickBreaking(4, 8)
    out = sticks(torch.zeros(1, 4), sample=False)
    torch.testing.assert_close(out.pi, torch.full((1, 8), 1 / 8), atol=1e-4, rtol=0)
    sampled = sticks(torch.zeros(4000, 4)).pi.mean(0)
    torch.testing.assert_close(sampled, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    count, perplexity = get_effective_components(out.pi)
    assert count.item() == 8
    assert perplexity.item() == pytest.approx(8, abs=1e-2)


def test_given_u_decides_and_mean_mode_is_deterministic():
    sticks = AdaptiveStickBreaking(4, 5)
    features, u = torch.randn(7, 4), torch.rand(7, 4)
    assert torch.equal(sticks(features, u).pi, sticks(features, u).pi)
    assert torch.equal(sticks(features, sample=False).pi, sticks(features, sample=False).pi)
    assert torch.isfinite(sticks(features, torch.zeros(7, 4)).log_pi).all()  # the generator's own lower end
    assert torch.isfinite(sticks(features, torch.ones(7, 4)).log_pi).all()


def test_one_component_is_refused():
    with pytest.raises(ValueError, match="max_components=1"):
        AdaptiveStickBreaking(4, 1)


def test_effective_components():
    count, perplexity = get_effective_components(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    assert count.tolist() == [1, 2]
    assert perplexity.tolist() == pytest.approx([1, 2])


@settings(deadline=None, max_examples=40)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_gamma_kl_and_moments(log_concentration, log_rate):
    concentration, rate = (torch.tensor(x, dtype=torch.float64).exp() for x in (log_concentration, log_rate))
    q, p = torch.distributions.Gamma(concentration, rate), torch.distributions.Gamma(*torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(GammaPosterior.kl(concentration, rate), torch.distributions.kl_divergence(q, p))
    # E[alpha] and E[log alpha] from the head are those of the distribution: entropy = -E[log q] is made of both.
    head = GammaPosterior(1).double()
    with torch.no_grad():
        head.parameters_head.weight.zero_()
        head.parameters_head.bias.copy_(3 * torch.atanh(torch.tensor([log_concentration, log_rate]).double().clamp(-2.99, 2.99) / 3))
    out = head(torch.zeros(1, dtype=torch.float64))
    q = torch.distributions.Gamma(out.concentration, out.rate)
    log_density = out.concentration * out.rate.log() + (out.concentration - 1) * out.mean_log - out.rate * out.mean
    torch.testing.assert_close(-(log_density - torch.lgamma(out.concentration)), q.entropy())


def test_gamma_starts_near_the_prior_and_stays_finite():
    head = GammaPosterior(8)
    out = head(torch.randn(5, 3, 8))
    assert out.mean.shape == (5, 3)
    assert head.kl(out.concentration, out.rate).max() < 0.2
    for value in head(torch.randn(5, 8) * 1e6):
        assert torch.isfinite(value).all()
