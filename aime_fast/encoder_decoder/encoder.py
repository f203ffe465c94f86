"""VAEEncoder: q(z_t | x_t, c_t), a residual tower in the manner of NVAE (Vahdat and Kautz, arXiv 2007.03898)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.layers import MLP, ResidualCell, downsample, full_precision, group_norm, halvings

LOGVAR_BOUND = 8.0  # log-variances are bounded smoothly to [-8, 8]: standard deviations in [0.018, 55]


def bounded_logvar(raw: Tensor) -> Tensor:
    """Smooth bound of a log-variance, in full precision."""
    return LOGVAR_BOUND * torch.tanh(full_precision(raw) / LOGVAR_BOUND)


class Posterior(NamedTuple):
    """q(z | x, c) of N frames."""

    mean: Tensor  # [N, Z]
    logvar: Tensor  # [N, Z]
    features: Tensor  # [N, C, H/8, W/8], for the Gram distance


class VAEEncoder(nn.Module):
    """Convolutional tower; context joins after pooling.

    Args:
        image_size: H = W.
        latent_dim, context_dim: Z, Dc.
        channels: widths at H/2, H/4, H/8, H/16; residual cells from H/4 on.
        blocks: residual cells at each resolution.
    """

    def __init__(self, image_size: int, latent_dim: int, context_dim: int, channels: tuple[int, ...], blocks: int = 2):
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"encoder_channels is {channels}, expected four widths, for H/2, H/4, H/8 and H/16")
        self.stem = nn.Sequential(downsample(3, channels[0]), nn.SiLU())
        self.levels = nn.ModuleList(
            nn.Sequential(downsample(a, b), *(ResidualCell(b) for _ in range(blocks))) for a, b in itertools.pairwise(channels)
        )
        grid, width = halvings(image_size, 4)[-1], channels[-1]
        self.pool = nn.Sequential(
            group_norm(width), nn.SiLU(), nn.Flatten(), nn.Linear(width * grid * grid, 4 * width), nn.LayerNorm(4 * width)
        )
        self.posterior = MLP(4 * width + context_dim, 4 * width, 2 * latent_dim)
        # A latent that starts as noise is ignored by the decoder, and then nothing teaches the encoder. So frames start apart
        # (means a few tenths from each other) and posteriors narrow.
        with torch.no_grad():
            self.posterior[-1].weight[:latent_dim] *= 8.0
            self.posterior[-1].bias[latent_dim:] = -4.0
            # The context changes from update to update while tokens are being learnt; it joins from zero, as it proves useful.
            self.posterior[0].weight[:, 4 * width :] = 0.0

    def forward(self, frames: Tensor, context: Tensor) -> Posterior:
        """frames [N, 3, H, W] in [-1, 1], context [N, Dc] -> `Posterior`."""
        x = self.stem(frames.contiguous(memory_format=torch.channels_last))
        x = self.levels[0](x)
        features = self.levels[1](x)
        x = self.levels[2](features)
        mean, logvar = self.posterior(torch.cat([self.pool(x), context], dim=-1)).chunk(2, dim=-1)
        return Posterior(full_precision(mean), bounded_logvar(logvar), features)

    def features(self, frames: Tensor) -> Tensor:
        """Feature maps at H/8 alone: frames [N, 3, H, W] -> [N, C, H/8, W/8]."""
        x = self.stem(frames.contiguous(memory_format=torch.channels_last))
        return self.levels[1](self.levels[0](x))
