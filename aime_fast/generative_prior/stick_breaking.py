"""Mixture weights by stick-breaking with Kumaraswamy sticks whose parameters a network predicts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.runtime import ranks
from kernels.kumaraswamy import kumaraswamy_beta_kl, kumaraswamy_log_mean, kumaraswamy_mean_sticks, kumaraswamy_sticks

LOG_BOUND = 5.0  # log a and log b stay in [-5, 5]


class StickBreakingOutput(NamedTuple):
    """Mixture weights and the sticks they come from; float32 or float64."""

    log_pi: Tensor  # [..., K]
    log_a: Tensor  # [..., K-1]
    log_b: Tensor  # [..., K-1]
    sampled: Tensor | None  # [..., K-1], the sticks; None: their means
    kl: Tensor | None  # [..., K-1], nats: KL of each stick to Beta(1, alpha); None without an alpha

    @property
    def pi(self) -> Tensor:
        """[..., K], sums to 1."""
        return self.log_pi.exp()

    @property
    def v(self) -> Tensor:
        """The sticks [..., K-1]."""
        return kumaraswamy_log_mean(self.log_a, self.log_b).exp() if self.sampled is None else self.sampled


class AdaptiveStickBreaking(nn.Module):
    """Features -> v_k ~ Kumaraswamy(a_k, b_k), k < K -> pi_k = v_k prod_{j<k} (1 - v_j), pi_K the remainder.

    The last linear map starts small around a_k = 1, b_k = K - k. There E[v_k] = 1 / (K - k + 1), so every weight is 1/K in
    expectation and no component starts out of use.

    Args:
        input_dim: width F of the features.
        max_components: K, at least 2.
    """

    def __init__(self, input_dim: int, max_components: int):
        super().__init__()
        if max_components < 2:
            raise ValueError(f"max_components={max_components}: a mixture by stick-breaking needs at least 2 components")
        self.max_components = max_components
        self.parameters_head = nn.Linear(input_dim, 2 * (max_components - 1))
        left = torch.arange(max_components - 1, 0, -1, dtype=torch.float64)  # K - k
        start = LOG_BOUND * torch.atanh(left.log() / LOG_BOUND).clamp_max(3.0)  # a bound far beyond K = 100
        with torch.no_grad():
            nn.init.normal_(self.parameters_head.weight, std=0.1 / math.sqrt(input_dim))
            self.parameters_head.bias.copy_(torch.cat([torch.zeros_like(start), start]))

    def uniform(self, shape: torch.Size, like: Tensor, dim: int = 0) -> Tensor:
        """Randoms in [0, 1) [*shape, K-1] for samples, on the device of `like`; axis `dim` of the shape is the sequences of a batch."""
        return ranks.rand(
            *shape, self.max_components - 1, dim=dim, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
        )

    def forward(
        self,
        features: Tensor,
        u: Tensor | None = None,
        sample: bool = True,
        alpha: Tensor | None = None,
        log_alpha: Tensor | None = None,
        kl: str = ModelConfig.kl,
    ) -> StickBreakingOutput:
        """Mixture weights for features [..., F].

        Args:
            u: uniform randoms in [0, 1] [..., K-1]; those of `uniform` when left out, [B, K-1].
            sample: False takes the mean of each stick instead of a sample.
            alpha, log_alpha, kl: prior of the sticks and the method, see `kernels.kumaraswamy.kumaraswamy_sticks`; [..., 1] or [..., K-1].
        """
        raw = self.parameters_head(features)
        raw = raw if raw.dtype == torch.float64 else raw.float()  # under autocast too: log space needs float32
        log_a, log_b = (LOG_BOUND * torch.tanh(raw / LOG_BOUND)).chunk(2, -1)  # [..., K-1]
        if not sample:
            log_pi = kumaraswamy_mean_sticks(log_a, log_b)
            divergence = None if alpha is None else kumaraswamy_beta_kl(log_a, log_b, alpha, log_alpha, kl)
            return StickBreakingOutput(log_pi, log_a, log_b, None, divergence)
        if u is None:
            u = self.uniform(features.shape[:-1], log_a)
        sticks = kumaraswamy_sticks(log_a, log_b, u, alpha, log_alpha, kl)
        return StickBreakingOutput(sticks.log_pi, log_a, log_b, sticks.v, sticks.kl)


def get_effective_components(pi: Tensor, threshold: float = 0.01) -> tuple[Tensor, Tensor]:
    """Components in use: pi [..., K] -> (number of weights above `threshold`, exp(entropy)), both [...] in the dtype of pi."""
    count = (pi > threshold).sum(-1).to(pi.dtype)
    return count, torch.special.entr(pi).sum(-1).exp()
