"""A frame of reference that moves with what differs from the background.

An object looks the same wherever it is. Seen from where it is, pictures of it lie on a manifold with two dimensions less, which an encoder
unfolds much sooner: without this the angle of a pole was a code of its picture at each place, which no recurrence learnt to predict
(docs/log.md). Source of the idea: spatial transformers, Jaderberg et al., arXiv 1506.02025. A translation is separable, so both uses
here are products with two narrow matrices, deterministic on every device.

A place is (x, y) in units of half the image, (0, 0) its middle.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = 1 / 4096  # squared difference, a pixel of the image, that counts as one in the middle: a picture of nothing is there
CELLS = 8  # of an outline, along each edge
PLACE_SCALE = 3.0  # of places as latents: a standard deviation of about 1


def place(difference: Tensor) -> Tensor:
    """Centre of mass of the squared difference from a background: [N, 3, H, W] -> [N, 2]."""
    size = difference.shape[-1]
    energy = difference.square().sum(1)  # [N, H, W]
    x = (torch.arange(size, device=energy.device, dtype=energy.dtype) + 0.5) * (2 / size) - 1
    moment = torch.stack([energy.sum(1) @ x, energy.sum(2) @ x], dim=1)
    return moment / (energy.sum((1, 2)) + EMPTY * size**2).unsqueeze(1)


def moved(pictures: Tensor, offset: Tensor, repeat_edge: bool = False) -> Tensor:
    """Pictures [N, C, H, W] moved by offset [N, 2], linearly interpolated. What comes in from outside is 0, or the edge repeated."""
    size = pictures.shape[-1]
    points = torch.arange(size, device=offset.device, dtype=offset.dtype) - offset.unsqueeze(2) * (size / 2)  # [N, 2, H]
    return _resampled(pictures, points.clamp(0, size - 1) if repeat_edge else points, 1.0)


def outline(pictures: Tensor, seen_from: Tensor) -> Tensor:
    """Pictures [N, C, H, W] seen from places [N, 2], blurred to `CELLS` x `CELLS` points: [N, C, CELLS, CELLS]. It changes smoothly with
    whatever the picture shows."""
    size = pictures.shape[-1]
    cell = size / CELLS
    points = (torch.arange(CELLS, device=seen_from.device, dtype=seen_from.dtype) + 0.5) * cell - 0.5
    return _resampled(pictures, points + seen_from.unsqueeze(2) * (size / 2), cell) / cell**2


def _resampled(pictures: Tensor, points: Tensor, width: float) -> Tensor:
    """Pictures [N, C, H, W] weighed by triangles of half-width `width`, in pixels, around points [N, 2, n] -> [N, C, n, n]."""
    pixel = torch.arange(pictures.shape[-1], device=points.device, dtype=points.dtype)
    across, down = (1 - (points.unsqueeze(3) - pixel).abs() / width).clamp_min(0).to(pictures.dtype).unbind(1)  # [N, n, H], [N, n, W]
    rows = (pictures.flatten(1, 2) @ across.mT).unflatten(1, pictures.shape[1:3])  # [N, C, H, n]
    return down.unsqueeze(1) @ rows
