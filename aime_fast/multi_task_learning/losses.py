"""Loss terms that belong to no single pillar."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from aime_fast.layers import full_precision, outside_autocast


def gaussian_log_prob(z: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(z | mean, diag exp(logvar)) summed over the last axis: [..., Z] -> [...]."""
    return -0.5 * ((z - mean).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def mixture_log_prob(z: Tensor, log_weights: Tensor, means: Tensor, logvars: Tensor) -> Tensor:
    """log sum_k pi_k N(z | mu_k, diag exp(logvar_k)): z [..., Z], log_weights [..., K], means [..., K, Z],
    logvars [..., K, Z] or [..., 1, Z] -> [...]."""
    return torch.logsumexp(log_weights + gaussian_log_prob(z.unsqueeze(-2), means, logvars), dim=-1)


def kl_monte_carlo(z: Tensor, mean: Tensor, logvar: Tensor, log_weights: Tensor, means: Tensor, logvars: Tensor) -> Tensor:
    """log q(z) - log p(z) at a sample z of q, in nats: the estimate of KL(q || mixture), [..., Z] and [..., K, Z] -> [...]."""
    return gaussian_log_prob(z, mean, logvar) - mixture_log_prob(z, log_weights, means, logvars)


def categorical_entropy(log_weights: Tensor) -> Tensor:
    """Entropy in nats of weights given as logs: [..., K] -> [...]."""
    return -(log_weights.exp() * log_weights).sum(-1)


def gram_distance(features: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared distance of the Gram matrices of unit-length position features (Siméoni et al., arXiv 2508.10104, section 4).

    Args: features, anchor [N, C, h, w]; the anchor gets no gradient.
    """
    unit = [F.normalize(full_precision(f).flatten(2), dim=1) for f in (features, anchor.detach())]
    with outside_autocast(features):
        ours, theirs = (f.transpose(1, 2) @ f for f in unit)  # [N, P, P]
    return (ours - theirs).square().mean()
