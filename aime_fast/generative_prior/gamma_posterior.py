"""Amortised posterior of the concentration alpha of the stick-breaking prior."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

LOG_BOUND = 3.0  # log concentration and log rate stay in [-3, 3]: mean of alpha in [0.0025, 403], mean of log alpha above -24


class GammaPosteriorOutput(NamedTuple):
    """q(alpha | h) = Gamma(concentration, rate), and the two moments that the KL of the sticks needs; each [...]."""

    concentration: Tensor
    rate: Tensor
    mean: Tensor  # E[alpha] = concentration / rate
    mean_log: Tensor  # E[log alpha] = digamma(concentration) - log rate


class GammaPosterior(nn.Module):
    """h -> q(alpha | h). Starts near its prior, Gamma(1, 1).

    Args:
        input_dim: width of h.
    """

    def __init__(self, input_dim: int):
        super().__init__()
        self.parameters_head = nn.Linear(input_dim, 2)
        nn.init.normal_(self.parameters_head.weight, std=0.1 / math.sqrt(input_dim))
        nn.init.zeros_(self.parameters_head.bias)

    def forward(self, h: Tensor) -> GammaPosteriorOutput:
        """h [..., F] -> Gamma parameters and moments, each [...], float32 or float64."""
        raw = self.parameters_head(h)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        log_concentration, log_rate = (LOG_BOUND * torch.tanh(raw / LOG_BOUND)).unbind(-1)
        concentration = log_concentration.exp()
        return GammaPosteriorOutput(
            concentration, log_rate.exp(), (log_concentration - log_rate).exp(), torch.special.digamma(concentration) - log_rate
        )

    @staticmethod
    def kl(concentration: Tensor, rate: Tensor) -> Tensor:
        """KL(Gamma(concentration, rate) || Gamma(1, 1)) in nats: [...] twice -> [...]."""
        return (
            (concentration - 1) * torch.special.digamma(concentration)
            - torch.lgamma(concentration)
            + torch.log(rate)
            + concentration * (1 - rate) / rate
        )
