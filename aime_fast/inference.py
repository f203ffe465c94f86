"""What the model infers about frames that it sees, as one record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.attention_schema.posterior import AttentionMaps
from aime_fast.attention_schema.prior import PredictedAttention
from aime_fast.encoder_decoder.encoder import Posterior
from aime_fast.generative_prior.dpgmm_prior import Mixture


class Inference(NamedTuple):
    """What is inferred about N = B*T frames, or about the B frames of one step."""

    posterior: Posterior
    latents: Tensor  # [N, Z]
    moved: Tensor  # [N, Z], how far the posterior mean is from that of the frame before; 0 in an episode's first
    prior: Mixture
    context: Tensor  # [B, T, Dc]; [B, Dc] in a step
    hidden: Tensor  # [B, T, Dh]; [B, Dh] in a step
    lstm: Tensor  # [B, T, layers, 2, Dh], after each frame; [B, layers, 2, Dh] in a step
    maps: AttentionMaps
    attention_before: Tensor  # [N, Ha, Wa]
    expected: PredictedAttention
    drawn: Tensor  # [N, P, H, W], parameters of the likelihood

    def describe(self, codes: Tensor, likelihood: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The per-frame outputs by name, with leading axes `shape`: [B, T], or [B] for one frame."""
        flat = dict(
            reconstructions=likelihood.mean(self.drawn), latents=self.latents, posterior_mean=self.posterior.mean,
            posterior_logvar=self.posterior.logvar, mixture_weights=self.prior.log_weights.exp(), component_means=self.prior.means,
            component_logvars=self.prior.logvars, slot_maps=self.maps.slot_maps, attention=self.maps.attention,
            attention_prior=self.expected.log_attention.exp(), movement=self.expected.movement,
        )  # fmt: skip
        out = {name: value.unflatten(0, shape) for name, value in flat.items()}
        return out | dict(hidden=self.hidden, context=self.context, tokens=codes)


def draw_latents(posterior: Posterior, sample: bool) -> Tensor:
    """z [N, Z]: a reparameterised sample, or the mean. The KL is always taken at a sample: at the mean it is off by Z/2 nats."""
    if not sample:
        return posterior.mean
    return posterior.mean + torch.randn_like(posterior.mean) * (0.5 * posterior.logvar).exp()


def recurrent_input(latents: Tensor, moved: Tensor, context: Tensor, actions: Tensor) -> Tensor:
    """What the recurrence reads: [..., 2 Z + Dc + A].

    Where the latent is and how far it moved, without the posterior's noise, which is as large as the movement of a frame: from noisy
    latents the recurrence learns no speed.
    """
    return torch.cat([latents, moved, context.to(latents.dtype), actions.to(latents.dtype)], dim=-1)
