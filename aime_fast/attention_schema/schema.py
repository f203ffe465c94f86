"""AttentionSchema: posterior and prior together, with their losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.attention_schema.posterior import AttentionPosterior
from aime_fast.attention_schema.prior import AttentionPrior
from aime_fast.config import ModelConfig
from aime_fast.layers import full_precision, grid_coordinates, outside_autocast
from aime_fast.runtime import ranks

LOG_FLOOR = 1e-8  # keeps log A finite where a map is zero


class AttentionSchema(nn.Module):
    """Attention inferred from a frame (`posterior`) and predicted before it (`prior`).

    Args: see `AttentionPosterior` and `AttentionPrior`.
    """

    def __init__(
        self,
        image_size: int,
        hidden_dim: int,
        context_dim: int,
        latent_dim: int,
        attention_dim: int = ModelConfig.attention_dim,
        num_slots: int = ModelConfig.num_attention_slots,
        iterations: int = ModelConfig.slot_iterations,
        fusion: str = ModelConfig.attention_fusion,
        prior_dim: int = ModelConfig.attention_prior_dim,
    ):
        super().__init__()
        self.posterior = AttentionPosterior(image_size, hidden_dim, context_dim, attention_dim, num_slots, iterations, fusion)
        self.grid = self.posterior.grid
        self.prior = AttentionPrior(self.grid, hidden_dim, latent_dim, prior_dim)
        self.register_buffer("coordinates", grid_coordinates(self.grid), persistent=False)

    def uniform(self, batch: int) -> Tensor:
        """The map before the first frame: [batch, Ha, Wa]."""
        return torch.full((batch, self.grid, self.grid), 1.0 / self.grid**2, device=self.coordinates.device, dtype=self.coordinates.dtype)

    def centre(self, attention: Tensor) -> Tensor:
        """Centre of mass (x, y), as a share of the image: [..., Ha, Wa] -> [..., 2]."""
        with outside_autocast(attention):
            return torch.einsum("...hw,chw->...c", attention, self.coordinates.to(attention.dtype))

    def motion_loss(self, attention: Tensor, before: Tensor, movement: Tensor, start: Tensor) -> Tensor:
        """Smooth L1 between the predicted movement, averaged under the map of the frame before, and that of the centre of mass.

        Only the predicted movement gets gradient: maps must not learn to stand still.

        Args: attention, before [B, T, Ha, Wa]; movement [B, T, 2, Ha, Wa]; start bool [B, T], frames without a past.
        """
        target = (self.centre(attention) - self.centre(before)).detach()
        with outside_autocast(before):
            predicted = torch.einsum("bthw,btchw->btc", before.detach(), movement)
        error = F.smooth_l1_loss(predicted, target, reduction="none", beta=0.05).sum(-1)
        weight = (~start).to(error.dtype)
        return (error * weight).sum() / ranks.mean(weight.sum()).clamp_min(1.0 / ranks.size())


def attention_kl(attention: Tensor, log_prior: Tensor) -> Tensor:
    """KL(A_post || A_prior) in nats: [..., Ha, Wa] twice -> [...]."""
    return (attention * (attention.clamp_min(LOG_FLOOR).log() - log_prior)).sum((-2, -1))


def foreground(frames: Tensor, background: Tensor, grid: int) -> Tensor:
    """Where frames differ from the background: share of the squared difference in each cell, without gradient.

    Args: frames [N, 3, H, W]; background [3, H, W]; grid: Ha = Wa.

    Returns: [N, Ha, Wa], sums to 1.
    """
    with torch.no_grad():
        difference = (full_precision(frames) - full_precision(background)).square().mean(1, keepdim=True)
        cells = F.adaptive_avg_pool2d(difference, grid)[:, 0] + LOG_FLOOR
        return cells / cells.sum((1, 2), keepdim=True)


def slot_overlap(slot_maps: Tensor) -> Tensor:
    """Mean cosine between the maps of two slots of a frame, 1 where all slots look alike: [N, S, Ha, Wa] -> scalar."""
    unit = F.normalize(slot_maps.flatten(2), dim=2)
    with outside_autocast(unit):
        cosine = unit @ unit.transpose(1, 2)  # [N, S, S]
    slots = slot_maps.shape[1]
    return ((cosine.sum((1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(1)) / max(slots * (slots - 1), 1)).mean()


def map_entropy(slot_maps: Tensor) -> Tensor:
    """Mean entropy of the slots' maps as a share of the largest: [N, S, Ha, Wa] -> scalar."""
    maps = slot_maps.flatten(2)
    return -(maps * maps.clamp_min(LOG_FLOOR).log()).sum(2).mean() / math.log(maps.shape[2])
