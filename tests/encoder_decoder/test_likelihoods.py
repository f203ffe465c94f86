"""Pixel likelihoods are normalised densities."""

from __future__ import annotations

import pytest
import torch

from aime_fast.encoder_decoder.likelihoods import Gaussian, MixtureOfLogistics


def test_gaussian_likelihood_is_the_normal_density():
    x, mean = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = -torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(0.3).nll(mean, x), expected)


def test_mixture_of_logistics_is_a_distribution_over_colours():
    """Summed over all colours it is 1; narrow components in the middle let half the levels of each channel suffice."""
    torch.manual_seed(0)
    likelihood = MixtureOfLogistics(2)
    parameters = torch.randn(1, 20, 1, 1)
    parameters[:, 2:8] *= 0.05  # means
    parameters[:, 14:] *= 0.1  # coefficients
    parameters[:, 8:14] = -3.0  # log-scales: 6 levels wide
    levels = torch.linspace(-1, 1, 256)[64:192]
    colours = torch.cartesian_prod(levels, levels, levels)[..., None, None]  # [128^3, 3, 1, 1]
    total = sum((-likelihood.nll(parameters.expand(len(c), -1, -1, -1), c)).exp().sum().item() for c in colours.split(2**18))
    assert total == pytest.approx(1.0, abs=2e-3)
