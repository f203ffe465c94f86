"""OutcomeHeads: what an action brings, read from h_t and m_t: its reward, and whether the episode goes on."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.control.two_hot import BINS, TwoHot
from aime_fast.layers import full_precision, near_zero


class Outcome(NamedTuple):
    """Of N actions, or with other leading axes."""

    reward: Tensor  # logits [N, BINS]
    continues: Tensor  # logit [N]


class OutcomeHeads(nn.Module):
    """The reward of a_t as a two-hot distribution, and the probability that its discount is not 0.

    Args: hidden_dim, latent_dim: Dh, Z.

    The last layer starts near zero: what is not known yet is a reward of about 0.
    """

    def __init__(self, hidden_dim: int, latent_dim: int):
        super().__init__()
        width = max(1, hidden_dim // 2)
        self.trunk = nn.Sequential(nn.Linear(hidden_dim + latent_dim, width), nn.RMSNorm(width), nn.SiLU())
        self.heads = near_zero(nn.Linear(width, BINS + 1))
        self.two_hot = TwoHot()

    def forward(self, hidden: Tensor, latents: Tensor) -> Outcome:
        """h_t [..., Dh], which knows a_t, and m_t [..., Z] -> `Outcome`."""
        logits = full_precision(self.heads(self.trunk(torch.cat([hidden, latents.to(hidden.dtype)], -1))))
        return Outcome(logits[..., :-1], logits[..., -1])

    def expected(self, hidden: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(reward, probability that the episode goes on), each [...], of h_t [..., Dh] and m_t [..., Z]."""
        outcome = self(hidden, latents)
        return self.two_hot.decode(outcome.reward), outcome.continues.sigmoid()

    def score(self, hidden: Tensor, latents: Tensor, reward: Tensor, discount: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies of reward and continuation, in nats, each [...]; reward and discount [...] as recorded."""
        outcome = self(hidden, latents)
        return (
            self.two_hot.nll(outcome.reward, reward),
            F.binary_cross_entropy_with_logits(outcome.continues, (discount > 0).to(outcome.continues.dtype), reduction="none"),
        )
