"""DPGMMPrior: p(z_t | h_{t-1}, c_{t-1}, m_{t-1}, m_{t-2}), a Gaussian mixture whose weights come from a truncated Dirichlet process.

Sources: Sethuraman 1994 (stick-breaking); Nalisnick and Smyth, arXiv 1605.06197 (Kumaraswamy sticks in a VAE).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.encoder_decoder.encoder import MEAN_BOUND, bounded_logvar
from aime_fast.generative_prior.gamma_posterior import GammaPosterior
from aime_fast.generative_prior.stick_breaking import AdaptiveStickBreaking
from aime_fast.layers import DELTA_SCALE, MLP, full_precision
from aime_fast.runtime import ranks

OFFSET_STD = 0.1  # standard deviation of the initial biases of the components' offsets
LEAST_VARIANCE = 1e-6  # of a sample where the noise of q(z) is all that a component has: the root of 0 has an infinite gradient
HEAD_SCALE = 0.1  # of the initial weights of the components: at first their biases say nearly all


class PriorNoise(NamedTuple):
    """The random numbers of samples of the prior, for N frames or with other leading axes."""

    sticks: Tensor  # [N, K-1], uniform
    choice: Tensor  # [N, K], Gumbel
    latents: Tensor  # [N, Z], normal


class Mixture(NamedTuple):
    """A Gaussian mixture for each of N frames."""

    log_weights: Tensor  # [N, K], log pi
    means: Tensor  # [N, K, Z]
    logvars: Tensor  # [N, K, Z]
    kl_hierarchical: Tensor | None  # [N], nats: sticks and concentration
    features: Tensor  # [N, Dh], what all heads but that of the concentration read

    def sample(self, sample: bool = True, noise: PriorNoise | None = None, inferred_variance: Tensor | float = 0.0) -> Tensor:
        """The mean of q(z) [N, Z]: that of the likeliest component, or a sample. No gradient passes the choice of the component.

        Args: inferred_variance [Z], of q(z). A component is a density of z, wider by that than the means of q(z) are spread: a sample has
        the variance of its component less this one.
        """
        if not sample:
            chosen = self.log_weights.argmax(-1)
        else:
            gumbel = -ranks.exponential_like(self.log_weights).log() if noise is None else noise.choice
            chosen = (self.log_weights + gumbel).argmax(-1)
        index = chosen[:, None, None].expand(-1, 1, self.means.shape[-1])
        mean = self.means.gather(1, index)[:, 0]
        if not sample:
            return mean
        normal = ranks.randn_like(mean) if noise is None else noise.latents
        variance = self.logvars.gather(1, index)[:, 0].exp() - inferred_variance
        return mean + normal * variance.clamp_min(LEAST_VARIANCE).sqrt()


def prior_noise(seeds: Sequence[int], frames: int, components: int, latent_dim: int, like: Tensor) -> PriorNoise:
    """Noise [B, frames, ...] whose row b is a function of seeds[b] alone, drawn on the CPU, with the dtype and device of `like`."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniform, exponential = torch.rand(2, frames, components, generator=generator, dtype=torch.float64).clamp_min(1e-12)
        normal = torch.randn(frames, latent_dim, generator=generator, dtype=torch.float64)
        rows.append((uniform[:, 1:], -(-exponential.log()).log(), normal))
    return PriorNoise(*(torch.stack(part).to(like) for part in zip(*rows)))


class DPGMMPrior(nn.Module):
    """Weights, widths, offsets and gates are network outputs of the concatenated [h, c, m_{t-1}, 5 (m_{t-1} - m_{t-2})].

    h knows both latents, but through gates; given beside it they predict a frame ahead 1 nat better after 200 updates. No layer norm comes
    before the heads, and the weights of the components start small: a film of 50 frames is the sum of as many offsets (docs/log.md).

    Means are offsets from an extrapolation of the latent, m_{t-1} + g (m_{t-1} - m_{t-2}), where m is the mean of q(z), inferred or
    imagined, and g in (0, 1) a gate for each dimension; they have the bound of posterior means. Objects in a video have inertia; a network
    that had to find speed in h by itself did not within 750 updates (docs/log.md).

    Args:
        hidden_dim, context_dim, latent_dim: Dh, Dc, Z.
        max_components: K.
        kl: "exact" or "series10", see `kernels.kumaraswamy.kumaraswamy_sticks`.

    `spread` is of roll-outs, see `overshooting.imagine_and_score`. `inferred_variance` [Z] is that of q(z) in a typical frame; zero until
    the latent phase sets it.
    """

    def __init__(
        self, hidden_dim: int, context_dim: int, latent_dim: int, max_components: int = ModelConfig.max_components, kl: str = ModelConfig.kl
    ):
        super().__init__()
        self.latent_dim, self.components, self.kl_method = latent_dim, max_components, kl
        self.trunk = nn.Sequential(MLP(hidden_dim + context_dim + 2 * latent_dim, hidden_dim, hidden_dim), nn.SiLU())
        self.sticks = AdaptiveStickBreaking(hidden_dim, max_components)
        self.alpha = GammaPosterior(hidden_dim)
        self.components_head = nn.Linear(hidden_dim, 2 * max_components * latent_dim)
        self.inertia = nn.Linear(hidden_dim, latent_dim)
        self.spread_head = nn.Linear(hidden_dim, latent_dim)
        nn.init.zeros_(self.inertia.weight)
        nn.init.zeros_(self.inertia.bias)
        self.register_buffer("inferred_variance", torch.zeros(latent_dim))
        with torch.no_grad():  # components start at different means, all near the extrapolation
            self.components_head.weight.mul_(HEAD_SCALE)
            self.components_head.bias.copy_(
                torch.cat([torch.randn(max_components * latent_dim) * OFFSET_STD, torch.zeros(max_components * latent_dim)])
            )

    def spread(self, features: Tensor) -> Tensor:
        """Log-variance [..., Z] around the means at the end of a roll-out whose last features [..., Dh] these are."""
        return bounded_logvar(self.spread_head(features))

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        latents: Tensor,
        delta: Tensor,
        sample: bool = True,
        uniform: Tensor | None = None,
        choice_only: bool = False,
    ) -> Mixture:
        """Predicts a frame's latent from the frame before.

        Args: hidden [N, Dh]; context [N, Dc]; latents, delta [N, Z], the latent and its difference from the one before it; sample: False
            takes mean sticks; uniform [N, K-1], of sampled sticks; None draws them; choice_only: the weights, many small operators, get
            no gradient and no `kl_hierarchical`: enough to sample.
        """
        features = self.trunk(torch.cat([hidden, *(x.to(hidden.dtype) for x in (context, latents, DELTA_SCALE * delta))], dim=-1))
        means, logvars = self.components_head(features).unflatten(-1, (2, self.components, self.latent_dim)).unbind(-3)
        extrapolated = latents + self.inertia(features).sigmoid() * delta
        means = (full_precision(extrapolated).unsqueeze(-2) + full_precision(means)).clamp(-MEAN_BOUND, MEAN_BOUND)
        if choice_only:
            with torch.no_grad():
                log_weights, divergences = self.sticks(features, uniform, sample).log_pi, None
        else:
            concentration, rate, alpha, log_alpha = self.alpha(hidden)
            sticks = self.sticks(features, uniform, sample, alpha[..., None], log_alpha[..., None], self.kl_method)
            log_weights, divergences = sticks.log_pi, sticks.kl.sum(-1) + self.alpha.kl(concentration, rate)
        return Mixture(log_weights, means, bounded_logvar(logvars), divergences, features)
