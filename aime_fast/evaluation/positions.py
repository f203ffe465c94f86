"""Positions of objects in a predicted picture, from its nearest neighbours among training frames whose positions are known.

No detector is trained: the positions are the mean of those of the k nearest training frames in blurred pixels. The reader has an error of
its own, so its error on the true frames is reported beside every figure.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aime_fast.data import DMCVBDataset, normalise

MAX_FRAMES = 4000  # most training frames of a reader
BLUR = 8  # a blurred pixel is the mean over about this part of the side: thin poles that do not overlap still have a distance


class PositionReader:
    """Positions of pictures by their nearest neighbours.

    Args:
        pixels: uint8 [M, 3, H, W], the known frames.
        positions: float32 [M, n, 2], (column, row) in pixels.
        names: of the n points.
        neighbours: k.
    """

    def __init__(self, pixels: Tensor, positions: Tensor, names: Sequence[str], neighbours: int = 3):
        known = torch.cat([_blurred(normalise(part)) for part in pixels.split(256)])  # [M, P]
        self._centre = known.mean(0)  # subtracted, since what all frames share would cost precision
        self._known = known - self._centre
        self._half_norms = self._known.square().sum(1) / 2
        self.positions, self.names, self.neighbours = positions, tuple(names), min(neighbours, len(positions))

    def __call__(self, frames: Tensor) -> Tensor:
        """frames [N, F, 3, H, W] in [-1, 1] -> positions float32 [N, F, n, 2]."""
        blurred = _blurred(frames.float().clamp(-1, 1).flatten(0, 1)) - self._centre
        nearness = blurred @ self._known.T - self._half_norms  # has the order of minus the squared distance
        nearest = nearness.topk(self.neighbours, dim=1).indices  # [N*F, k]
        return self.positions[nearest].mean(1).unflatten(0, frames.shape[:2])


def _blurred(frames: Tensor) -> Tensor:
    """Means over squares around every second pixel, inside the picture: [N, 3, H, W] -> [N, P]."""
    half = frames.shape[-1] // (2 * BLUR)
    return F.avg_pool2d(frames, 2 * half + 1, stride=2, padding=half, count_include_pad=False).flatten(1)


def make_reader(dataset: DMCVBDataset, episodes: Sequence[int], device: torch.device | str = "cpu") -> PositionReader:
    """A reader that knows at most `MAX_FRAMES` frames, evenly spread over training episodes of a data set that has positions."""
    episodes = episodes[:: -(-len(episodes) // MAX_FRAMES)]
    share = MAX_FRAMES // len(episodes)
    pixels, positions = [], []
    for index in episodes:
        episode = dataset.read_episode(index)
        rows = torch.linspace(0, len(episode) - 1, min(share, len(episode))).round().long()
        pixels.append(episode["pixels"][rows])
        positions.append(episode["positions"][rows])
    return PositionReader(torch.cat(pixels).to(device), torch.cat(positions).to(device), dataset.position_names)


def position_errors(read: Tensor, truth: Tensor, image_size: int) -> Tensor:
    """Distance in pixels of each point, [N, F, n, 2] -> [N, F, n]; NaN where the true point lies outside the picture, as no picture
    can tell where."""
    inside = ((truth > -0.5) & (truth < image_size - 0.5)).all(-1)
    return torch.where(inside, (read - truth).norm(dim=-1), torch.nan)
