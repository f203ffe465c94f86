"""The temporal discriminator reads every pixel, whatever the image size."""

from __future__ import annotations

import pytest
import torch

from aime_fast.encoder_decoder import TemporalDiscriminator


@pytest.mark.parametrize("size", [64, 84, 30])
def test_every_pixel_counts(size):
    torch.manual_seed(0)
    discriminator = TemporalDiscriminator(size, latent_dim=3, dim=16, layers=1)
    video = torch.rand(1, 2, 3, size, size, requires_grad=True)
    discriminator(video, torch.zeros(1, 2, 3))[0].sum().backward()
    assert video.grad.abs().sum((0, 1, 2)).min() > 0
