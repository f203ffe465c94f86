"""A scalar of unknown size as a categorical distribution: two-hot over bins that are evenly spaced in symlog.

Source: Hafner et al., arXiv 2301.04104. Here the expectation is taken in symlog, not of the bins' own values: the outermost bins stand for
numbers of 5e8, and a gradient through their expectation, as an actor takes it through imagined frames, would be theirs alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BINS = 255
LIMIT = 20.0  # largest symlog of a bin


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


class TwoHot(nn.Module):
    """Reads and scores logits [..., BINS] of scalars [...]."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bins", torch.linspace(-LIMIT, LIMIT, BINS), persistent=False)

    def decode(self, logits: Tensor) -> Tensor:
        """Logits [..., BINS] -> scalars [...]: symexp of the expected symlog, which is below the mean where the scalar is uncertain."""
        probabilities = logits.softmax(-1)  # in fp32 under autocast, where a matrix product would not be
        return symexp((probabilities * self.bins.to(probabilities.dtype)).sum(-1))

    def nll(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy [...], in nats, of the two-hot target of scalars [...], which get no gradient."""
        place = (symlog(target.detach()).clamp(-LIMIT, LIMIT) + LIMIT) * ((BINS - 1) / (2 * LIMIT))
        lower = place.nan_to_num().floor().clamp(max=BINS - 2)  # what is not finite makes the loss so, not an index
        upper_share = (place - lower).unsqueeze(-1)
        index = lower.long().unsqueeze(-1)
        log_prob = logits.log_softmax(-1)
        return -((1 - upper_share) * log_prob.gather(-1, index) + upper_share * log_prob.gather(-1, index + 1)).squeeze(-1)
