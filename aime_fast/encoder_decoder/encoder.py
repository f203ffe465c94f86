"""VAEEncoder: q(z_t | x_t, c_t), a residual tower like that of NVAE (Vahdat and Kautz, arXiv 2007.03898)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.encoder_decoder.keypoints import SpatialSoftmax
from aime_fast.layers import MLP, ResidualCell, downsample, full_precision, group_norm, halvings, outside_autocast, to_frames

LOGVAR_BOUND = 8.0  # log-variances are bounded smoothly to [-8, 8]: standard deviations in [0.018, 55]
MEAN_BOUND = 5.0  # means to [-5, 5]: the prior is relative to the last latent, so nothing else bounds them


def bounded_logvar(raw: Tensor) -> Tensor:
    """Smooth bound of a log-variance [...], in full precision."""
    return LOGVAR_BOUND * torch.tanh(full_precision(raw) / LOGVAR_BOUND)


def bounded_mean(raw: Tensor) -> Tensor:
    """Smooth bound of a latent's mean [...], in full precision."""
    return MEAN_BOUND * torch.tanh(full_precision(raw) / MEAN_BOUND)


class Posterior(NamedTuple):
    """q(z | x, c) of N frames."""

    mean: Tensor  # [N, Z]
    logvar: Tensor  # [N, Z]
    features: Tensor  # [N, C, H/8, W/8], for the Gram distance


class VAEEncoder(nn.Module):
    """Convolutional tower, pooled to keypoints of its channels at H/8 and channel means at H/16; context joins after pooling.

    But for its bound the mean is linear in the pooled features: a latent moves as the objects in the picture move.

    Args:
        image_size: H = W.
        latent_dim, context_dim: Z, Dc.
        channels: widths at H/2, H/4, H/8, H/16; residual cells from H/4 on.
        blocks: residual cells at each resolution.
    """

    def __init__(
        self, image_size: int, latent_dim: int, context_dim: int, channels: tuple[int, ...], blocks: int = ModelConfig.blocks_per_level
    ):
        super().__init__()
        if len(channels) != 4:
            raise ValueError(f"encoder_channels is {channels}, expected four widths, for H/2, H/4, H/8 and H/16")
        self.stem = nn.Sequential(downsample(3, channels[0]), nn.SiLU())
        self.levels = nn.ModuleList(
            nn.Sequential(downsample(a, b), *(ResidualCell(b) for _ in range(blocks))) for a, b in itertools.pairwise(channels)
        )
        eighth, width = halvings(image_size, 3)[-1], channels[-1]
        self.places = nn.Sequential(group_norm(channels[2]), SpatialSoftmax(channels[2], eighth))
        self.strengths = nn.Sequential(group_norm(width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        pooled = 2 * channels[2] + width
        self.mean = nn.Linear(pooled + context_dim, latent_dim)
        self.logvar = MLP(pooled + context_dim, 4 * width, latent_dim)
        # The decoder ignores a latent that starts as noise, and then the encoder gets no gradient. So means of different frames start far
        # apart and posteriors narrow.
        with torch.no_grad():
            self.mean.weight *= 16.0
            self.logvar[-1].bias.fill_(-4.0)
            # The context changes from update to update while tokens are being learnt, so its weights start at zero.
            self.mean.weight[:, pooled:] = 0.0
            self.logvar[0].weight[:, pooled:] = 0.0

    def forward(self, frames: Tensor, context: Tensor) -> Posterior:
        """frames [N, 3, H, W], uint8 or in [-1, 1], context [N, Dc] -> `Posterior`."""
        frames = to_frames(frames, self.mean.weight.dtype, check=False)
        x = self.stem(frames.contiguous(memory_format=torch.channels_last))
        x = self.levels[0](x)
        features = self.levels[1](x)
        x = torch.cat([self.places(features), self.strengths(self.levels[2](features)), context], dim=-1)
        with outside_autocast(x):  # delta is a small difference of two means
            mean = bounded_mean(self.mean(full_precision(x)))
        return Posterior(mean, bounded_logvar(self.logvar(x)), features)

    def features(self, frames: Tensor) -> Tensor:
        """Feature maps at H/8 alone: frames [N, 3, H, W] -> [N, C, H/8, W/8]."""
        x = self.stem(frames.contiguous(memory_format=torch.channels_last))
        return self.levels[1](self.levels[0](x))
