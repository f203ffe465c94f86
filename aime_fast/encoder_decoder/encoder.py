"""VAEEncoder: q(z_t | x_t, c_t), patches, strided convolutions, residual cells of NVAE (Vahdat and Kautz, arXiv 2007.03898)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.layers import ResidualCell, ToPatches, downsample, full_precision, halvings, outside_autocast, to_frames

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
    """Tower over patches of 4x4 pixels: strided convolutions, residual cells (none at tier 1), and a dense layer which the context joins.

    A dense layer can say what has no place of its own, as an angle. Pooled to keypoints the tower learns much slower (docs/log.md).

    Args:
        image_size: H = W.
        latent_dim, context_dim: Z, Dc.
        channels: widths at H/4, H/8, H/16.
        blocks: residual cells at each resolution.
        dense: width of the dense layer.
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        context_dim: int,
        channels: tuple[int, ...],
        blocks: int = ModelConfig.blocks_per_level,
        dense: int = ModelConfig.dense_dim,
    ):
        super().__init__()
        if len(channels) != 3:
            raise ValueError(f"encoder_channels is {channels}, expected three widths, for H/4, H/8 and H/16")

        def level(enter: nn.Module, width: int) -> nn.Sequential:
            return nn.Sequential(enter, *(ResidualCell(width) for _ in range(blocks)), nn.SiLU())

        self.levels = nn.ModuleList(
            [level(ToPatches(image_size, channels[0]), channels[0]), *(level(downsample(a, b), b) for a, b in itertools.pairwise(channels))]
        )
        grid = halvings(image_size, 4)[-1]
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * grid**2, dense), nn.LayerNorm(dense), nn.SiLU())
        self.mean = nn.Linear(dense + context_dim, latent_dim)
        self.logvar = nn.Linear(dense + context_dim, latent_dim)
        # The decoder ignores a latent that starts as noise, and then the encoder gets no gradient. So means of different frames start far
        # apart and posteriors narrow.
        with torch.no_grad():
            self.mean.weight *= 4.0
            self.logvar.weight *= 0.1
            self.logvar.bias.fill_(-4.0)
            # The context changes from update to update while tokens are being learnt, so its weights start at zero.
            self.mean.weight[:, dense:] = 0.0
            self.logvar.weight[:, dense:] = 0.0

    def forward(self, frames: Tensor, context: Tensor) -> Posterior:
        """frames [N, 3, H, W], uint8 or in [-1, 1], context [N, Dc] -> `Posterior`."""
        frames = to_frames(frames, self.mean.weight.dtype, check=False)
        features = self.features(frames)
        x = torch.cat([self.dense(self.levels[2](features)), context], dim=-1)
        with outside_autocast(x):  # delta is a small difference of two means
            mean = bounded_mean(self.mean(full_precision(x)))
        return Posterior(mean, bounded_logvar(self.logvar(x)), features)

    def features(self, frames: Tensor) -> Tensor:
        """Feature maps at H/8 alone: frames [N, 3, H, W] -> [N, C, H/8, W/8]."""
        return self.levels[1](self.levels[0](frames))
