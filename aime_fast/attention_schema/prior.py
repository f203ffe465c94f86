"""AttentionPrior (top-down): attention predicted from the map, recurrent state and latent of the frame before."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.layers import TransformerBlock, downsample, full_precision, grid_positions, halvings

MAX_MOVEMENT = 0.5  # largest predicted movement of a position in one frame, as a share of the image


class PredictedAttention(NamedTuple):
    """The prior's map of N frames, and how each of its positions is predicted to move."""

    log_attention: Tensor  # [N, Ha, Wa], exp sums to 1
    movement: Tensor  # [N, 2, Ha, Wa], (dx, dy) as a share of the image


class AttentionPrior(nn.Module):
    """p(A_t | A_{t-1}, h_{t-1}, z_{t-1}) and a movement field.

    Convolutions with large kernels read the map of the frame before; self-attention over the grid (at half its resolution) and
    cross-attention to [h, z] predict a re-weighting of that map. Like the posterior it passes no gradient to h and z.

    Args:
        grid: Ha = Wa.
        hidden_dim, latent_dim: Dh, Z.
        dim: width.
    """

    def __init__(self, grid: int, hidden_dim: int, latent_dim: int, dim: int = ModelConfig.attention_prior_dim):
        super().__init__()
        self.grid, coarse = grid, halvings(grid, 1)[-1]
        self.coarse = coarse
        self.motion = nn.Sequential(nn.Conv2d(1, dim // 2, 7, padding=3), nn.SiLU(), downsample(dim // 2, dim))
        self.register_buffer("positions", grid_positions(coarse, coarse, dim), persistent=False)
        self.hidden_token = nn.Linear(hidden_dim, dim)
        self.latent_token = nn.Linear(latent_dim, dim)
        self.over_grid = TransformerBlock(dim, hidden_dim=2 * dim)
        self.to_memory = TransformerBlock(dim, hidden_dim=2 * dim, memory_dim=dim)
        self.head = nn.Conv2d(dim, 4 * 3, 3, padding=1)
        self.persistence = nn.Parameter(torch.tensor(0.5))  # weight of the log of the old map

    def forward(self, attention: Tensor, hidden: Tensor, latents: Tensor) -> PredictedAttention:
        """attention [N, Ha, Wa], hidden [N, Dh], latents [N, Z], all of frame t-1 -> `PredictedAttention` of frame t."""
        before = torch.log(attention * attention[0].numel() + 1e-3)  # 0 where uniform
        x = self.motion(before.unsqueeze(1)).permute(0, 2, 3, 1).flatten(1, 2) + self.positions
        memory = torch.stack([self.hidden_token(hidden.detach()), self.latent_token(latents.detach())], dim=1)
        x = self.to_memory(self.over_grid(x), memory)
        x = x.transpose(1, 2).unflatten(2, (self.coarse, self.coarse))
        out = full_precision(F.pixel_shuffle(self.head(x), 2))[..., : self.grid, : self.grid]
        logits = out[:, 0] + self.persistence * before
        log_attention = logits.flatten(1).log_softmax(1).view_as(logits)
        return PredictedAttention(log_attention, MAX_MOVEMENT * out[:, 1:].tanh())
