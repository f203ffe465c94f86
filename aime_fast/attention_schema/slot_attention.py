"""SlotAttention: slots compete for positions (Locatello et al., arXiv 2006.15055, algorithm 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.layers import full_precision


class SlotAttention(nn.Module):
    """Iterative attention with a softmax over slots, a GRU and a residual MLP.

    Args:
        dim: Ds, width of inputs and slots.
        iterations: rounds.
    """

    def __init__(self, dim: int, iterations: int = ModelConfig.slot_iterations):
        super().__init__()
        self.iterations, self.scale = iterations, dim**-0.5
        self.norm_inputs = nn.LayerNorm(dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.update = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, inputs: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """inputs [N, M, Ds], slots [N, S, Ds] -> (slots [N, S, Ds], maps [N, S, M]); each map sums to 1."""
        key, value = self.key_value(self.norm_inputs(inputs)).chunk(2, dim=-1)
        maps = None
        for _ in range(self.iterations):
            query = self.query(self.norm_slots(slots)) * self.scale
            share = full_precision(query @ key.transpose(1, 2)).softmax(dim=1) + 1e-8  # over slots: [N, S, M]
            maps = share / share.sum(dim=2, keepdim=True)
            update = maps.to(value.dtype) @ value  # [N, S, Ds]
            slots = gru(self.update, update, slots.to(update.dtype))
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, maps


def gru(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    """`cell` for x, h [..., D] -> [..., D]; written out where it is traced, since PyTorch's fused CUDA cell cannot be."""
    if x.is_cuda and not torch.compiler.is_compiling():
        return cell(x.flatten(0, -2), h.flatten(0, -2)).view_as(h)
    x_reset, x_update, x_new = F.linear(x, cell.weight_ih, cell.bias_ih).chunk(3, dim=-1)
    h_reset, h_update, h_new = F.linear(h, cell.weight_hh, cell.bias_hh).chunk(3, dim=-1)
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return new + (x_update + h_update).sigmoid() * (h - new)
