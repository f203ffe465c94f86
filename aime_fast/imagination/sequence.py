"""What the model infers about sequences of observed frames, in parallel over time but for the recurrence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.attention_schema.posterior import AttentionMaps
from aime_fast.attention_schema.prior import PredictedAttention
from aime_fast.encoder_decoder.encoder import Posterior
from aime_fast.generative_prior.dpgmm_prior import Mixture
from aime_fast.layers import DELTA_SCALE, delta_from, previous
from aime_fast.runtime import ranks
from aime_fast.runtime.spans import span


class Inference(NamedTuple):
    """What is inferred about N = B*T frames, or about the B frames of one step."""

    posterior: Posterior
    latents: Tensor  # [N, Z], a sample of the posterior in training, else its mean
    delta: Tensor  # [N, Z], posterior mean minus that of the frame before; 0 in an episode's first frame
    prior: Mixture
    context: Tensor  # [B, T, Dc]; [B, Dc] in a step
    hidden: Tensor  # [B, T, Dh]; [B, Dh] in a step
    lstm: Tensor  # [B, T, layers, 2, Dh], after each frame; [B, layers, 2, Dh] in a step
    maps: AttentionMaps
    attention_before: Tensor  # [N, Ha, Wa], attention of the frame before
    predicted: PredictedAttention
    decoded: Tensor | None  # [N, P, H, W], parameters of the likelihood; None where nobody looks at the pictures

    def rows(self, chosen: slice, shape: tuple[int, int]) -> Inference:
        """What is inferred about some of the B = shape[0] sequences, of T = shape[1] frames each; without pictures."""

        def choose(part: Any) -> Any:
            if isinstance(part, tuple):
                return type(part)(*map(choose, part))
            return None if part is None else part[chosen] if part.shape[:2] == shape else part.unflatten(0, shape)[chosen].flatten(0, 1)

        return Inference(*map(choose, self._replace(decoded=None)))

    def describe(self, codes: Tensor, likelihood: nn.Module, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The per-frame outputs by name, with leading axes `shape`: [B, T], or [B] for one frame; B may be less for pictures."""
        flat = dict(
            reconstructions=likelihood.mean(self.decoded), latents=self.latents, posterior_mean=self.posterior.mean,
            posterior_logvar=self.posterior.logvar, mixture_weights=self.prior.log_weights.exp(), component_means=self.prior.means,
            component_logvars=self.prior.logvars, slot_maps=self.maps.slot_maps, attention=self.maps.attention,
            attention_prior=self.predicted.log_attention.exp(), movement=self.predicted.movement,
        )  # fmt: skip
        out = {name: value.unflatten(0, (-1, *shape[1:])) for name, value in flat.items()}
        return out | dict(hidden=self.hidden, context=self.context, tokens=codes)


class LatentPrediction(NamedTuple):
    """The recurrence over B sequences of T frames, and for each of the N = B*T frames the prior of its latent."""

    delta: Tensor  # [B, T, Z], latent minus that of the frame before; 0 in an episode's first frame
    hidden: Tensor  # [B, T, Dh]
    lstm: Tensor  # [B, T, layers, 2, Dh]
    hidden_before: Tensor  # [N, Dh], of the frame before
    latents_before: Tensor  # [N, Z], of the frame before
    prior: Mixture


def predict_latents(model: nn.Module, latents: Tensor, context: Tensor, actions: Tensor, start: Tensor, sample: bool) -> LatentPrediction:
    """Runs the recurrence and predicts each frame's latent from the frame before.

    Args: latents [B, T, Z], the posterior means; context [B, T, Dc]; actions [B, T, A]; start bool [B, T]; sample: False takes mean sticks.
    """
    before = previous(latents, start)
    delta = delta_from(before, latents, start)
    with span("temporal_dynamics: LSTM"):
        hidden, lstm = model.recurrence(recurrent_input(latents, delta, context, actions), start)
    hidden_before, delta_before = (previous(x, start).flatten(0, 1) for x in (hidden, delta))
    with span("generative_prior: prior"):
        given = context if model.prior_context == "current" else previous(context, start)
        uniform = model.prior.sticks.uniform(hidden.shape[:2], hidden).flatten(0, 1) if sample else None
        prior = model.prior(hidden_before, given.flatten(0, 1), before.flatten(0, 1), delta_before, sample, uniform)
    return LatentPrediction(delta, hidden, lstm, hidden_before, before.flatten(0, 1), prior)


def sample_latents(mean: Tensor, logvar: Tensor, sample: bool) -> Tensor:
    """z [B, ..., Z]: a reparameterised sample, or the mean. The KL is always taken at a sample: at the mean it is off by Z/2 nats."""
    if not sample:
        return mean
    return mean + ranks.randn_like(mean) * (0.5 * logvar).exp()


def recurrent_input(latents: Tensor, delta: Tensor, context: Tensor, actions: Tensor) -> Tensor:
    """The input of the recurrence, [..., 2 Z + Dc + A], from latents and delta [..., Z], context [..., Dc], actions [..., A].

    Latents are posterior means: a sample's noise is as large as the movement of a frame, and from noisy latents the recurrence learns
    no speed. Delta is scaled: as small as it is, little would be learnt from it in a short training.
    """
    return torch.cat([latents, DELTA_SCALE * delta, context.to(latents.dtype), actions.to(latents.dtype)], dim=-1)


class Latents(NamedTuple):
    """What was inferred about B sequences of T frames and is needed to go on without pictures."""

    mean: Tensor  # [B, T, Z]
    logvar: Tensor  # [B, T, Z]
    context: Tensor  # [B, T, Dc]
    actions: Tensor  # [B, T, A]
    reward: Tensor  # [B, T], of each action
    discount: Tensor  # [B, T], after each action
    attention: Tensor  # [B, T, Ha, Wa]
    seeds: Tensor  # [B, T, S, Ds], of the slots


@torch.no_grad()
def infer_latents(model: nn.Module, pixels: Tensor, actions: Tensor, reward: Tensor, discount: Tensor) -> Latents:
    """`Latents` of frames uint8 [B, T, 3, H, W] with actions [B, T, A] and what they brought, [B, T] each, by a model in eval mode."""
    inferred = model.infer(pixels, actions)
    seeds = model.attention.posterior.seeds(inferred.hidden, inferred.context)
    flat = (inferred.posterior.mean, inferred.posterior.logvar, inferred.maps.attention)
    mean, logvar, attention = (x.unflatten(0, actions.shape[:2]) for x in flat)
    return Latents(mean, logvar, inferred.context, actions, reward, discount, attention, seeds)
