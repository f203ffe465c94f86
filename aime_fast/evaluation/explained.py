"""How much of the picture near an object a model explains, beyond the mean frame.

A PSNR of the whole picture hardly sees a thin pole. Here the squared error is summed over the pixels near the true place of each point
alone: 1 - SE(model) / SE(mean frame) is 0 for the mean frame, 1 for the exact picture, and below 0 where an object is drawn so wrongly
that the mean frame is nearer to the truth. It needs no reader of positions, so it has no floor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips

RADIUS = 2.0  # pixels around a point or a line


def lines(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """What is measured: each point (from itself to itself), and `<pole>/whole`, the line from the cart to the tip of a pole, where both
    are among the points. Values are indices of the two ends in `names`."""
    ends = {name: (i, i) for i, name in enumerate(names)}
    if "cart" in names:
        ends |= {f"{name.removesuffix('/tip')}/whole": (names.index("cart"), i) for i, name in enumerate(names) if name.endswith("/tip")}
    return ends


def masks_near(positions: Tensor, ends: Sequence[tuple[int, int]], image_size: int, radius: float = RADIUS) -> Tensor:
    """Pixels whose centre is within `radius` of each line: positions [..., n, 2] as (column, row) -> bool [..., m, H, W].

    Parts outside the picture have no pixels. A point that is not finite has none at all.
    """
    row, column = torch.meshgrid(*2 * [torch.arange(image_size, device=positions.device, dtype=torch.float32)], indexing="ij")
    pixel = torch.stack([column, row], -1)  # [H, W, 2]
    masks = []
    for a, b in ends:
        first, last = (positions[..., i, None, None, :].float() for i in (a, b))  # [..., 1, 1, 2]
        along = last - first
        share = ((pixel - first) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-12)  # [..., H, W], of the way from a to b
        nearest = first + share.clamp(0, 1).unsqueeze(-1) * along
        masks.append((pixel - nearest).square().sum(-1) <= radius**2)
    return torch.stack(masks, -3)


def error_near(frames: Tensor, truth: Tensor, masks: Tensor) -> Tensor:
    """Squared error summed over the pixels of each mask and colours: [..., 3, H, W] twice, masks [..., m, H, W] -> float32 [..., m]."""
    error = (frames.float().clamp(-1, 1) - truth.float()).square().sum(-3)  # [..., H, W]
    return torch.stack([(error * mask).sum((-2, -1)) for mask in masks.unbind(-3)], -1)


def explained_share(error: Tensor, of_mean_frame: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    """1 - SE(model) / SE(mean frame) of each line, pooled over all leading axes of [..., m]; None where there is nothing to explain."""
    ours, theirs = (x.double().flatten(0, -2).sum(0).tolist() for x in (error, of_mean_frame))
    return {name: 1 - a / b if b > 0 else None for name, a, b in zip(names, ours, theirs)}


@torch.no_grad()
def explain_reconstruction(
    model: nn.Module, clips: Clips, mean_frame: Tensor, names: Sequence[str], batch: int = 16
) -> dict[str, float | None]:
    """`explained_share` of the reconstructions of whole clips, context and horizon, each clip as one sequence.

    Args: model with `reconstruct`, in eval mode; clips with positions; mean_frame [3, H, W] in [-1, 1], on the model's device; names of
    the points.
    """
    ends, errors = lines(names), []
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch].to(mean_frame.device)
        truth = normalise(part.pixels)
        masks = masks_near(part.positions, list(ends.values()), truth.shape[-1])
        frames = model.reconstruct(part.pixels, part.actions), mean_frame.expand_as(truth)
        errors.append(torch.stack([error_near(film, truth, masks) for film in frames]).cpu())
    ours, theirs = torch.cat(errors, 1)
    return explained_share(ours, theirs, list(ends))
