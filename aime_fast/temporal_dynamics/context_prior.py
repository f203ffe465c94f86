"""ContextPrior: predicts the context of imagined frames, which have no tokens to compute it from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aime_fast.layers import MLP


class ContextPrior(nn.Module):
    """c_t from h_{t-1}, c_{t-1} and z_t, as a change of c_{t-1}; the initial weights make it zero.

    Args: hidden_dim, context_dim, latent_dim: Dh, Dc, Z.
    """

    def __init__(self, hidden_dim: int, context_dim: int, latent_dim: int):
        super().__init__()
        self.change = MLP(hidden_dim + context_dim + latent_dim, hidden_dim, hidden_dim, context_dim)
        nn.init.zeros_(self.change[-1].weight)
        nn.init.zeros_(self.change[-1].bias)

    def forward(self, hidden: Tensor, context: Tensor, latents: Tensor) -> Tensor:
        """hidden [B, Dh] and context [B, Dc] of frame t-1, latents [B, Z] of frame t -> context [B, Dc] of frame t."""
        context = context.to(hidden.dtype)
        return context + self.change(torch.cat([hidden, context, latents], dim=-1))
