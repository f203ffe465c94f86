"""Loss terms against torch.distributions."""

from __future__ import annotations

import torch

from aime_fast.multi_task_learning.losses import gaussian_log_prob, mixture_log_prob


def test_mixture_log_prob_is_torch_distributions():
    torch.manual_seed(0)
    z, weights = torch.randn(5, 3), torch.randn(5, 4).log_softmax(-1)
    means, logvars = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    d = torch.distributions
    normal = d.Independent(d.Normal(means, (0.5 * logvars).exp()), 1)
    torch.testing.assert_close(
        mixture_log_prob(z, weights, means, logvars), d.MixtureSameFamily(d.Categorical(logits=weights), normal).log_prob(z)
    )
    torch.testing.assert_close(
        gaussian_log_prob(z, means[:, 0], logvars[:, 0]), d.Independent(d.Normal(means[:, 0], (0.5 * logvars[:, 0]).exp()), 1).log_prob(z)
    )
