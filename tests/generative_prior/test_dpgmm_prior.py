"""The mixture prior extrapolates the latent."""

from __future__ import annotations

import torch

from aime_fast.encoder_decoder.encoder import MEAN_BOUND
from aime_fast.generative_prior import DPGMMPrior
from aime_fast.generative_prior.dpgmm_prior import Mixture


def test_the_prior_extrapolates_the_latent():
    torch.manual_seed(0)
    prior = DPGMMPrior(hidden_dim=8, context_dim=6, latent_dim=3, max_components=16).double()
    with torch.no_grad():
        prior.trunk[0][0].weight[:, -6:] = 0.0  # what the network makes of latents and delta comes on top
    hidden, context, latents, delta = (torch.randn(5, n, dtype=torch.float64) for n in (8, 6, 3, 3))
    still = prior(hidden, context, latents, torch.zeros_like(delta), sample=False)
    going = prior(hidden, context, latents, delta, sample=False)
    torch.testing.assert_close(going.means - still.means, 0.5 * delta[:, None].expand(-1, 16, -1))  # the gates start half open
    shifted = prior(hidden, context, latents + 1.0, delta, sample=False)
    torch.testing.assert_close(shifted.means, going.means + 1.0)
    assert (still.means - latents[:, None]).std(1).min() > 0.05  # components start apart


def test_prior_means_have_the_bound_of_posterior_means():
    torch.manual_seed(0)
    prior = DPGMMPrior(hidden_dim=8, context_dim=6, latent_dim=3, max_components=4).double()
    hidden, context, delta = (torch.randn(5, n, dtype=torch.float64) for n in (8, 6, 3))
    means = prior(hidden, context, torch.full((5, 3), 4.9, dtype=torch.float64), 3.0 + delta.abs(), sample=False).means
    assert means.abs().max() <= MEAN_BOUND


def test_a_sample_is_as_wide_as_its_component_less_the_posterior():
    count, logvars = 20_000, torch.tensor([0.25, 0.04]).log().expand(20_000, 2, 2).requires_grad_()
    weights = torch.tensor([0.0, -1e4]).expand(count, 2)
    prior = Mixture(weights, torch.ones(count, 2, 2), logvars, None, torch.zeros(count, 3))
    torch.manual_seed(0)
    drawn = prior.sample(True, inferred_variance=torch.tensor([0.09, 0.05]))
    torch.testing.assert_close(drawn.mean(0), torch.ones(2), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.var(0), torch.tensor([0.16, 0.0]), atol=0.005, rtol=0)
    (gradient,) = torch.autograd.grad(drawn.square().sum(), logvars)
    assert gradient[:, 0, 0].all()  # widths learn from where samples go too
    assert not gradient[:, 0, 1].any()  # but not below the noise of q(z)
    torch.testing.assert_close(prior.sample(True).var(0), torch.tensor([0.25, 0.04]), atol=0.01, rtol=0)
