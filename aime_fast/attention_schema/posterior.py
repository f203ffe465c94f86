"""AttentionPosterior (bottom-up): attention inferred from a frame, the recurrent state and the context."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.attention_schema.slot_attention import SlotAttention
from aime_fast.config import ModelConfig
from aime_fast.layers import ToPatches, downsample, full_precision, grid_positions, halvings


class AttentionMaps(NamedTuple):
    """Where each slot, and all of them together, attend in N frames."""

    slot_maps: Tensor  # [N, S, Ha, Wa], each sums to 1
    attention: Tensor  # [N, Ha, Wa], sums to 1


class FeaturePyramid(nn.Module):
    """Frame -> features at H/8, merged top-down with those at H/16 (feature pyramid; Lin et al., arXiv 1612.03144)."""

    def __init__(self, image_size: int, dim: int):
        super().__init__()
        self.grid = halvings(image_size, 3)[-1]
        self.stem = nn.Sequential(ToPatches(dim // 2), nn.SiLU())
        self.fine = nn.Sequential(downsample(dim // 2, dim), nn.SiLU())
        self.coarse = nn.Sequential(downsample(dim, dim), nn.SiLU(), nn.Conv2d(dim, dim, 1))
        self.lateral = nn.Conv2d(dim, dim, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, Ha * Wa, Ds]."""
        fine = self.fine(self.stem(frames))
        above = F.interpolate(self.coarse(fine), fine.shape[-2:], mode="nearest")
        return (self.lateral(fine) + above).permute(0, 2, 3, 1).flatten(1, 2)


class AttentionPosterior(nn.Module):
    """Slots, seeded from [h_t, c_t], compete for the feature pyramid of x_t; their maps are fused into one.

    No gradient flows into h_t and c_t. Otherwise slot diversity, whose gradient on the encoder is fifty times that of the ELBO early in
    training, decides what the latent becomes.

    Args:
        image_size: H.
        hidden_dim, context_dim: Dh, Dc.
        dim, slots, iterations: Ds, S, rounds of slot attention.
        fusion: "weighted" (softmax weights of the slots), "max" (largest slot map), "gated" (independent sigmoid gates).
    """

    def __init__(
        self,
        image_size: int,
        hidden_dim: int,
        context_dim: int,
        dim: int = ModelConfig.attention_dim,
        slots: int = ModelConfig.num_attention_slots,
        iterations: int = ModelConfig.slot_iterations,
        fusion: str = ModelConfig.attention_fusion,
    ):
        super().__init__()
        if fusion not in ("weighted", "max", "gated"):
            raise ValueError(f"attention_fusion is {fusion!r}, expected 'weighted', 'max' or 'gated'")
        self.slots, self.dim, self.fusion = slots, dim, fusion
        self.pyramid = FeaturePyramid(image_size, dim)
        self.grid = self.pyramid.grid
        self.register_buffer("positions", grid_positions(self.grid, self.grid, dim), persistent=False)
        self.seed = nn.Linear(hidden_dim + context_dim, slots * dim)
        self.slot_identity = nn.Parameter(torch.randn(slots, dim))  # without it all slots would be equal
        self.slot_attention = SlotAttention(dim, iterations)
        self.score = nn.Linear(dim, 1)

    def forward(self, frames: Tensor, hidden: Tensor, context: Tensor) -> AttentionMaps:
        """frames [N, 3, H, W], hidden [N, Dh], context [N, Dc] -> `AttentionMaps`."""
        inputs = self.pyramid(frames) + self.positions
        slots, maps = self.slot_attention(inputs, self.seeds(hidden, context) + self.slot_identity)
        attention = self._fuse(maps, full_precision(self.score(slots)))
        grid = (self.grid, self.grid)
        return AttentionMaps(maps.unflatten(2, grid), attention.unflatten(1, grid))

    def seeds(self, hidden: Tensor, context: Tensor) -> Tensor:
        """The slots' initial values, without their identities: hidden [..., Dh], context [..., Dc] -> [..., S, Ds]."""
        state = torch.cat([hidden, context.to(hidden.dtype)], dim=-1).detach()
        return self.seed(state).unflatten(-1, (self.slots, self.dim))

    def _fuse(self, maps: Tensor, score: Tensor) -> Tensor:  # [N, S, M], [N, S, 1] -> [N, M]
        if self.fusion == "weighted":
            return (score.softmax(1) * maps).sum(1)
        fused = maps.amax(1) if self.fusion == "max" else ((score.sigmoid() + 1e-4) * maps).sum(1)
        return fused / fused.sum(1, keepdim=True)
