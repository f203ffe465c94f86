"""The bound of the posterior mean."""

from __future__ import annotations

import torch

from aime_fast.encoder_decoder.encoder import MEAN_BOUND, bounded_mean


def test_means_are_bounded_and_near_zero_as_they_came():
    raw = torch.tensor([0.1, 100.0, -100.0], dtype=torch.float64)
    torch.testing.assert_close(bounded_mean(raw), torch.tensor([0.1, MEAN_BOUND, -MEAN_BOUND], dtype=torch.float64), rtol=2e-4, atol=0)
