"""Discriminators: patches of single frames, and sequences of frames conditioned on the latent.

L_D = -E log D(x) - E log(1 - D(x_hat)) in logits form (Goodfellow et al., arXiv 1406.2661); patches after Isola et al.,
arXiv 1611.07004.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.layers import ToPatches, TransformerBlock, downsample, full_precision


class ImageDiscriminator(nn.Module):
    """Real or decoded, patch by patch: frames [N, 3, H, W] -> (logits [N, 1, H/8, W/8], features of each level).

    Args: channels: widths at H/4, H/8 and so on.
    """

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.levels = nn.ModuleList([ToPatches(channels[0]), *(downsample(a, b) for a, b in itertools.pairwise(channels))])
        self.head = nn.Conv2d(channels[-1], 1, 1)

    def forward(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = frames, []
        for level in self.levels:
            x = F.leaky_relu(level(x), 0.2)
            features.append(x)
        return full_precision(self.head(x)), features


class TemporalDiscriminator(nn.Module):
    """Real or decoded, from how frames follow each other.

    Args:
        image_size, latent_dim: H, Z.
        dim: width of the transformer.
        layers, heads: 4 and 4 in the specification.
        max_frames: learnt time positions; later frames repeat the last one.
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        dim: int = ModelConfig.discriminator_dim,
        layers: int = 4,
        heads: int = 4,
        max_frames: int = 64,
    ):
        super().__init__()
        patch = 8
        grid = -(-image_size // patch)
        self.missing = grid * patch - image_size  # rows and columns of zeros that complete the last patches
        self.frame = nn.Sequential(
            nn.Conv2d(3, dim // 2, patch, stride=patch), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(dim // 2 * grid**2, dim)
        )
        self.latent = nn.Linear(latent_dim, dim)
        self.time = nn.Parameter(torch.randn(max_frames, dim) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, 2 * dim) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 1))

    def forward(self, video: Tensor, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """video [B, T, 3, H, W], latents [B, T, Z] -> (logits [B, T], features [B, T, dim] of each layer)."""
        position = torch.arange(video.shape[1], device=video.device).clamp_max(self.time.shape[0] - 1)
        frames = F.pad(video.flatten(0, 1), (0, self.missing, 0, self.missing))
        x = self.frame(frames).unflatten(0, video.shape[:2]) + self.latent(latents) + self.time[position]
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return full_precision(self.head(x))[..., 0], features


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(x_hat)), a scalar, from logits [...]."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """-E log D(x_hat), the non-saturating form, a scalar, from logits [...]."""
    return F.softplus(-fake).mean()


def feature_matching(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean absolute distance of features, averaged over levels, a scalar (Salimans et al., arXiv 1606.03498); real gets no gradient."""
    distances = [full_precision((r.detach() - f).abs().mean()) for r, f in zip(real, fake)]
    return torch.stack(distances).mean()


def gradient_penalty(logits: Tensor, frames: Tensor) -> Tensor:
    """R1: half the squared gradient norm on real frames, a scalar (Mescheder et al., arXiv 1801.04406).

    Args: logits of frames [N, 3, H, W], which require grad.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), frames, create_graph=True)
    return 0.5 * gradient.flatten(1).square().sum(1).mean()


def discriminators_learn(
    image: ImageDiscriminator, temporal: TemporalDiscriminator, fake: Tensor, real: Tensor, latents: Tensor, penalty: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of both discriminators: fake, real [B, T, 3, H, W], latents [B, T, Z], all without gradient -> (scalar, scalars by name).

    penalty weighs the R1 penalty on real frames.
    """
    real_frames = real.flatten(0, 1).requires_grad_(penalty > 0)
    image_real, _ = image(real_frames)
    image_fake, _ = image(fake.flatten(0, 1))
    temporal_real, _ = temporal(real, latents)
    temporal_fake, _ = temporal(fake, latents)
    losses = dict(
        discriminator_image=discriminator_loss(image_real, image_fake),
        discriminator_temporal=discriminator_loss(temporal_real, temporal_fake),
    )
    total = sum(losses.values())
    return total + penalty * gradient_penalty(image_real, real_frames) if penalty > 0 else total, losses


def generator_learns(
    image: ImageDiscriminator, temporal: TemporalDiscriminator, fake: Tensor, real: Tensor, latents: Tensor
) -> dict[str, Tensor]:
    """Losses of the generator, scalars by name; arguments as in `discriminators_learn`, `fake` with gradient."""
    image_fake, image_features = image(fake.flatten(0, 1))
    temporal_fake, temporal_features = temporal(fake, latents)
    with torch.no_grad():
        _, image_anchor = image(real.flatten(0, 1))
        _, temporal_anchor = temporal(real, latents)
    matching = feature_matching(image_anchor, image_features) + feature_matching(temporal_anchor, temporal_features)
    return dict(generator=generator_loss(image_fake) + generator_loss(temporal_fake), feature_matching=matching)
