"""Keypoints: feature maps to coordinates (`SpatialSoftmax`, in the encoder) and back (`GaussianHeatmaps`, in the decoder).

In a flattened feature map every position of an object has a code of its own, and a dense layer has to learn to decode each of them.
Coordinates move as objects move: the next latent can be predicted from the last ones, and an object that is decoded at one position is
decoded at every other. Sources: Finn et al., arXiv 1509.06113 (spatial softmax); Jakab et al., arXiv 1806.07823 (Gaussian heatmaps).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aime_fast.layers import full_precision, grid_coordinates, outside_autocast

SHARPNESS = 4.0  # initial factor of the features, which are normalised, in the softmax
CELLS = 1.5  # initial standard deviation of a Gaussian, in cells of its grid
EDGE = 0.8  # Gaussians start within this share of the picture


class SpatialSoftmax(nn.Module):
    """Expected position of each channel: features [N, C, h, w] -> mean (x, y) under the channel's softmax, in [-1, 1], [N, 2 C].

    Args: channels, grid: C; h = w.
    """

    def __init__(self, channels: int, grid: int):
        super().__init__()
        self.sharpness = nn.Parameter(torch.full((channels, 1), SHARPNESS))
        self.register_buffer("coordinates", (2 * grid_coordinates(grid) - 1).flatten(1).T.contiguous(), persistent=False)  # [h w, 2]

    def forward(self, features: Tensor) -> Tensor:
        with outside_autocast(features):
            weight = (self.sharpness * full_precision(features).flatten(2)).softmax(-1)
            return (weight @ self.coordinates.to(weight.dtype)).flatten(1)


class GaussianHeatmaps(nn.Module):
    """z -> feature maps made of Gaussians whose positions and amplitudes are linear in z; the same positions at every resolution.

    Args:
        latent_dim: Z.
        count: number of Gaussians.
        grids: h = w of each feature map.
        channels: C of each feature map.
    """

    def __init__(self, latent_dim: int, count: int, grids: Sequence[int], channels: Sequence[int]):
        super().__init__()
        self.place, self.height = nn.Linear(latent_dim, 2 * count), nn.Linear(latent_dim, count)
        self.log_widths = nn.ParameterList(torch.full((count, 1, 1), math.log(2 * CELLS / grid)) for grid in grids)
        self.to_features = nn.ModuleList(nn.Conv2d(count, c, 1, bias=False) for c in channels)
        for i, grid in enumerate(grids):
            self.register_buffer(f"middles_{i}", 2 * grid_coordinates(grid)[0, 0] - 1, persistent=False)
        with torch.no_grad():  # a latent of unit size moves the positions by a third of the picture
            self.place.weight.normal_(std=0.6 / math.sqrt(latent_dim))
            self.place.bias.uniform_(-EDGE, EDGE)
            self.height.weight.normal_(std=0.4 / math.sqrt(latent_dim))
            self.height.bias.fill_(1.0)

    def forward(self, latents: Tensor) -> list[Tensor]:
        """latents [N, Z] -> a feature map [N, C, h, w] for each grid, channels last."""
        with outside_autocast(latents):
            places = self.place(full_precision(latents)).unflatten(1, (-1, 2, 1))
            heights = self.height(full_precision(latents)).unsqueeze(-1)
        maps = []
        for i, (log_width, to_features) in enumerate(zip(self.log_widths, self.to_features)):
            far = (getattr(self, f"middles_{i}").to(places.dtype) - places) / log_width.exp()  # [N, count, 2, grid]
            x, y = (-0.5 * far.square()).exp().unbind(2)
            x, y = x.transpose(1, 2).unsqueeze(1), (heights * y).transpose(1, 2).unsqueeze(2)
            maps.append(to_features((y * x).permute(0, 3, 1, 2)))  # the product [N, h, w, count] makes them channels-last
        return maps
