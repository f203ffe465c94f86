"""What the model infers about frames that it sees, as one record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.attention_schema.posterior import AttentionMaps
from aime_fast.attention_schema.prior import PredictedAttention
from aime_fast.encoder_decoder.encoder import Posterior
from aime_fast.generative_prior.dpgmm_prior import Mixture
from aime_fast.layers import previous
from aime_fast.spans import span


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


class Foretelling(NamedTuple):
    """The recurrence over B sequences of T frames, and the latent's prior, for each of N = B*T frames from the one before."""

    moved: Tensor  # [B, T, Z], how far the latent is from that of the frame before; 0 in an episode's first
    hidden: Tensor  # [B, T, Dh]
    lstm: Tensor  # [B, T, layers, 2, Dh]
    hidden_before: Tensor  # [N, Dh]
    latents_before: Tensor  # [N, Z]
    prior: Mixture


def foretell(model: nn.Module, latents: Tensor, context: Tensor, actions: Tensor, start: Tensor, sample: bool) -> Foretelling:
    """Args: latents [B, T, Z], the posterior means; context [B, T, Dc]; actions [B, T, A]; start bool [B, T]; sample: or mean sticks."""
    before = previous(latents, start)
    moved = torch.where(start[..., None], 0.0, latents - before)
    with span("temporal_dynamics: LSTM"):
        hidden, lstm = model.dynamics(recurrent_input(latents, moved, context, actions), start)
    hidden_before, moved_before = (previous(x, start).flatten(0, 1) for x in (hidden, moved))
    with span("generative_prior: prior"):
        given = context if model.prior_context == "current" else previous(context, start)
        prior = model.prior(hidden_before, given.flatten(0, 1), before.flatten(0, 1), moved_before, sample=sample)
    return Foretelling(moved, hidden, lstm, hidden_before, before.flatten(0, 1), prior)


def draw_latents(mean: Tensor, logvar: Tensor, sample: bool) -> Tensor:
    """z [..., Z]: a reparameterised sample, or the mean. The KL is always taken at a sample: at the mean it is off by Z/2 nats."""
    if not sample:
        return mean
    return mean + torch.randn_like(mean) * (0.5 * logvar).exp()


def recurrent_input(latents: Tensor, moved: Tensor, context: Tensor, actions: Tensor) -> Tensor:
    """What the recurrence reads: [..., 2 Z + Dc + A].

    Where the latent is and how far it moved, without the posterior's noise, which is as large as the movement of a frame: from noisy
    latents the recurrence learns no speed.
    """
    return torch.cat([latents, moved, context.to(latents.dtype), actions.to(latents.dtype)], dim=-1)
