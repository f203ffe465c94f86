"""Pixel likelihoods p(x | parameters): Gaussian of fixed width, mixture of discretised logistics.

Source of the mixture: Salimans et al., arXiv 1701.05517 (PixelCNN++), equations 1 to 3, with green and blue conditioned on the
channels before them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LEVELS = 256  # 8-bit pixels


class Gaussian(nn.Module):
    """N(mean, std^2) for each pixel and channel; `std` in units of pixels in [-1, 1]."""

    channels = 3

    def __init__(self, std: float = 0.1):
        super().__init__()
        if std <= 0:
            raise ValueError(f"likelihood_std is {std}, expected a positive number")
        self.std = std

    def around(self, raw: Tensor, background: Tensor) -> Tensor:
        """Network output [N, 3, H, W] and background [3, H, W] -> means."""
        return raw + background

    def mean(self, parameters: Tensor) -> Tensor:
        """[N, 3, H, W] -> expected frame [N, 3, H, W]."""
        return parameters

    def nll(self, parameters: Tensor, frames: Tensor) -> Tensor:
        """-log p(frames) in nats a frame: [N, 3, H, W] twice -> [N]."""
        squared = (frames - parameters).square().flatten(1).sum(1)
        constant = frames[0].numel() * (math.log(self.std) + 0.5 * math.log(2 * math.pi))
        return squared / (2 * self.std**2) + constant


class MixtureOfLogistics(nn.Module):
    """Mixture of discretised logistics over 8-bit RGB pixels; each component has 10 numbers a pixel."""

    def __init__(self, components: int = 10):
        super().__init__()
        self.components, self.channels = components, 10 * components

    def around(self, raw: Tensor, background: Tensor) -> Tensor:
        """Adds the background [3, H, W] to every component's means: [N, 10 M, H, W]."""
        m = self.components
        means = raw[:, m : 4 * m].unflatten(1, (3, m)) + background[:, None]
        return torch.cat([raw[:, :m], means.flatten(1, 2), raw[:, 4 * m :]], dim=1)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, rest = parameters.split([self.components, 9 * self.components], dim=1)
        means, log_scales, coefficients = rearrange(rest, "n (k c m) h w -> k n c m h w", k=3, c=3)
        return logits, means, log_scales.clamp_min(-7.0), coefficients.tanh()

    def mean(self, parameters: Tensor) -> Tensor:
        """[N, 10 M, H, W] -> expected frame [N, 3, H, W]."""
        logits, means, _, k = self._split(parameters)
        red = means[:, 0]
        green = means[:, 1] + k[:, 0] * red
        blue = means[:, 2] + k[:, 1] * red + k[:, 2] * green
        weights = logits.softmax(1)
        return torch.stack([(weights * channel).sum(1) for channel in (red, green, blue)], dim=1)

    def nll(self, parameters: Tensor, frames: Tensor) -> Tensor:
        """-log p(frames) in nats a frame, frames [N, 3, H, W] in [-1, 1] on the 8-bit grid -> [N]."""
        logits, means, log_scales, k = self._split(parameters)
        x = frames[:, :, None]  # [N, 3, 1, H, W]
        red, green = x[:, 0], x[:, 1]
        shift = torch.stack([torch.zeros_like(means[:, 0]), k[:, 0] * red, k[:, 1] * red + k[:, 2] * green], dim=1)
        centred = x - (means + shift)
        inverse, half_bin = torch.exp(-log_scales), 1.0 / (LEVELS - 1)
        upper, lower = inverse * (centred + half_bin), inverse * (centred - half_bin)
        inside = upper.sigmoid() - lower.sigmoid()
        # where the bin holds next to nothing, density times bin width (the density at its middle) is exact enough and has a gradient
        middle = inverse * centred
        log_density = middle - log_scales - 2 * F.softplus(middle) + math.log(2 * half_bin)
        log_bin = torch.where(inside > 1e-5, inside.clamp_min(1e-12).log(), log_density)
        log_bin = torch.where(x < -0.999, upper - F.softplus(upper), torch.where(x > 0.999, -F.softplus(lower), log_bin))
        log_pixel = torch.logsumexp(log_bin.sum(1) + logits.log_softmax(1), dim=1)  # [N, H, W]
        return -log_pixel.flatten(1).sum(1)
