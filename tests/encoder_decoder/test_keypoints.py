"""Keypoints and the bound of the posterior mean."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aime_fast.encoder_decoder.encoder import MEAN_BOUND, bounded_mean
from aime_fast.encoder_decoder.keypoints import GaussianHeatmaps, SpatialSoftmax


@given(x=st.floats(-0.7, 0.7), y=st.floats(-0.7, 0.7))
@settings(deadline=None, max_examples=20)
@torch.no_grad()
def test_a_gaussian_decoded_at_a_position_is_found_there(x, y):
    grid = 16
    decode = GaussianHeatmaps(latent_dim=2, count=1, grids=[grid], channels=[1]).double()
    decode.place.weight.copy_(torch.eye(2))
    decode.place.bias.zero_()
    decode.height.weight.zero_()
    decode.to_features[0].weight.fill_(1.0)
    (map_,) = decode(torch.tensor([[x, y]], dtype=torch.float64))
    assert map_.shape == (1, 1, grid, grid)
    find = SpatialSoftmax(1, grid).double()
    find.sharpness.fill_(1.0)
    found = find(map_.log())  # the softmax of the logarithm is the Gaussian itself, normalised
    torch.testing.assert_close(found, torch.tensor([[x, y]], dtype=torch.float64), atol=0.03, rtol=0)  # a quarter of a cell


def test_means_are_bounded_and_near_zero_as_they_came():
    raw = torch.tensor([0.1, 100.0, -100.0], dtype=torch.float64)
    torch.testing.assert_close(bounded_mean(raw), torch.tensor([0.1, MEAN_BOUND, -MEAN_BOUND], dtype=torch.float64), rtol=2e-4, atol=0)
