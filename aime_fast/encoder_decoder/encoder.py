"""VAEEncoder: q(z_t | x_t, c_t), patches, strided convolutions, residual cells of NVAE (Vahdat and Kautz, arXiv 2007.03898)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.encoder_decoder.reference import CELLS, PLACE_SCALE, moved, outline, place
from aime_fast.layers import ResidualCell, ToPatches, downsample, full_precision, halvings, outside_autocast, to_frames

LOGVAR_BOUND = 8.0  # log-variances are bounded smoothly to [-8, 8]: standard deviations in [0.018, 55]
MEAN_BOUND = 10.0  # means to [-10, 10]: the mixture prior is relative to the last latent, so without --stills nothing bounds them
OUTLINE_EPS = 1e-3  # variance of an outline that counts as nothing


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
    """Sees a frame's difference from the background in a moving frame of reference, by a tower over patches of 4x4 pixels: strided
    convolutions, residual cells (none at tier 1), and a dense layer.

    Means are linear in the place, an outline of the picture seen from there, the dense layer and the context. At first the first two are
    the place and the others random projections of the outline, beside little of the dense layer: a smooth code of what is seen.

    `background` [3, H, W] is the mean training frame, which the trainer sets. Where the camera moves, or frames are augmented, all of the
    picture differs from it, and the place says little.

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
            [level(ToPatches(channels[0]), channels[0]), *(level(downsample(a, b), b) for a, b in itertools.pairwise(channels))]
        )
        grid = halvings(image_size, 4)[-1]
        self.dense = nn.Sequential(nn.Linear(channels[-1] * grid**2 + 2, dense), nn.LayerNorm(dense), nn.SiLU())
        widths = (dense, 3 * CELLS**2, 2, context_dim)
        self.mean = nn.Linear(sum(widths), latent_dim)
        self.logvar = nn.Linear(dense + context_dim, latent_dim)
        self.register_buffer("background", torch.zeros(3, image_size, image_size))
        # The decoder ignores a latent that starts as noise, and then the encoder gets no gradient. So means of different frames start far
        # apart and posteriors narrow. The context changes from update to update while tokens are being learnt: its weights start at zero.
        with torch.no_grad():
            of_dense, of_outline, of_place, of_context = self.mean.weight.split(widths, dim=1)
            of_dense *= 0.5
            nn.init.orthogonal_(of_outline)
            of_outline[:2] = 0.0
            nn.init.eye_(of_place)
            of_place[2:] = 0.0
            of_context.zero_()
            self.logvar.weight *= 0.1
            self.logvar.weight[:, dense:] = 0.0
            self.logvar.bias.fill_(-4.0)

    def forward(self, frames: Tensor, context: Tensor) -> Posterior:
        """frames [N, 3, H, W], uint8 or in [-1, 1], context [N, Dc] -> `Posterior`."""
        difference, where = self._seen(frames)
        features = self._features(difference, where)
        scaled = PLACE_SCALE * where
        x = self.dense(torch.cat([self.levels[2](features).flatten(1), scaled], dim=-1))
        with outside_autocast(x):  # delta is a small difference of two means
            shape = outline(difference, where).flatten(1)
            shape = F.layer_norm(shape, shape.shape[1:], eps=OUTLINE_EPS)
            mean = bounded_mean(self.mean(torch.cat([full_precision(part) for part in (x, shape, scaled, context)], dim=-1)))
        return Posterior(mean, bounded_logvar(self.logvar(torch.cat([x, context], dim=-1))), features)

    def features(self, frames: Tensor) -> Tensor:
        """Feature maps at H/8 alone: frames [N, 3, H, W] -> [N, C, H/8, W/8]."""
        return self._features(*self._seen(frames))

    def _seen(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Difference from the background [N, 3, H, W] and the place [N, 2] of it."""
        difference = to_frames(frames, self.mean.weight.dtype, check=False) - self.background
        with outside_autocast(difference):
            return difference, place(difference)

    def _features(self, difference: Tensor, where: Tensor) -> Tensor:
        return self.levels[1](self.levels[0](moved(difference, -where)))
