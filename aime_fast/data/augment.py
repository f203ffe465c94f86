"""`normalise` turns stored pixels into model input; `augment` also zooms and shifts them. Both run on the device of the pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aime_fast.runtime import ranks


def normalise(pixels: Tensor) -> Tensor:
    """uint8 of any shape to float32 in [-1, 1]: 0 becomes -1, 255 becomes 1, both exactly."""
    return pixels.to(torch.float32) / 127.5 - 1


def augment(pixels: Tensor, max_shift: float, max_zoom: float, generator: torch.Generator | None = None) -> Tensor:
    """Normalise, then zoom and shift each sequence at random. All frames of a sequence get the same transform.

    The zoom factor is uniform in [1 - max_zoom, 1 + max_zoom], each shift is uniform within max_shift of the image's side. Pixels
    from outside the image repeat its border. Nothing is read back to the host.

    Args:
        pixels: uint8 [B, T, C, H, W].
        max_shift: largest shift, as a share of the image's side; 0 turns it off.
        max_zoom: largest zoom, as a share of the image's side; 0 turns it off.
        generator: on the device of the pixels; None uses that device's default generator.
    Returns:
        float32 [B, T, C, H, W] in [-1, 1].
    """
    b, t, c, h, w = pixels.shape
    frames = normalise(pixels)
    if not (max_shift or max_zoom):
        return frames
    noise = ranks.draw(lambda whole: torch.rand(whole, device=pixels.device, generator=generator), (b, 3)) * 2 - 1  # [B, 3] in [-1, 1)
    scale = 1 + max_zoom * noise[:, 0]  # of the sampling grid: above 1 it reaches beyond the image and zooms out
    shift = 2 * max_shift * noise[:, 1:]  # [B, 2], in grid units: the image is 2 wide
    zeros = torch.zeros_like(scale)
    theta = torch.stack([scale, zeros, shift[:, 0], zeros, scale, shift[:, 1]], dim=1).view(b, 2, 3)
    # Time goes into the channels: one grid, and one set of interpolation weights, serves all frames of a sequence.
    stacked = frames.reshape(b, t * c, h, w)
    grid = F.affine_grid(theta, [b, t * c, h, w], align_corners=False)
    return F.grid_sample(stacked, grid, mode="bilinear", padding_mode="border", align_corners=False).view(b, t, c, h, w)
