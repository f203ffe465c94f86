"""The world model one frame at a time: `step` observes the frame, `imagine` predicts and decodes it.

Both map a `State` of fixed shape to the next one and cost one frame, however long the video is. `step` is the definition that the
parallel path is tested against. `imagine` observes nothing: latent and attention come from their priors and the context is the mean one,
so a decoded frame is never an input. `model` is always the world model, whose methods of the same names are the public ones.

A policy chooses a_t when it knows z_t, so each of the two is made of halves: `observe` or `predict` gives latent, delta and context of
frame t, with h still that of the frame before; `advance` takes the action and gives h_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.encoder_decoder.encoder import Posterior
from aime_fast.generative_prior.dpgmm_prior import Mixture, PriorNoise
from aime_fast.imagination.sequence import Inference, recurrent_input, sample_latents
from aime_fast.perceiver_io.context import PerceptionCache
from aime_fast.runtime.roll_out import match_layout


class State(NamedTuple):
    """What one frame leaves for the next. Shapes, dtypes and strides are the same after any number of frames."""

    lstm: Tensor  # [B, layers, 2, Dh], hidden and cell
    hidden: Tensor  # [B, Dh], h_t
    latents: Tensor  # [B, Z], the mean of q(z_t), inferred or imagined
    delta: Tensor  # [B, Z], latents minus those of the frame before
    fresh: Tensor  # bool [B], true before an episode's first frame: there is no latent to take a difference from
    context: Tensor  # [B, Dc], c_t; after an imagined frame the mean of all
    attention: Tensor  # [B, Ha, Wa], A_t
    cache: PerceptionCache | None  # None where no further frame will be observed


def initial_state(model: nn.Module, batch: int) -> State:
    """The empty state before a first frame."""
    like, perceiver = model.decoder.background, model.perceiver_io

    def zeros(width: int) -> Tensor:
        return torch.zeros(batch, width, device=like.device, dtype=like.dtype)

    return State(
        lstm=model.recurrence.initial_state(batch, like.device, like.dtype),
        hidden=zeros(model.recurrence.hidden_dim),
        latents=zeros(model.latent_dim),
        delta=zeros(model.latent_dim),
        fresh=torch.ones(batch, dtype=torch.bool, device=like.device),
        context=zeros(perceiver.context_dim),
        attention=model.attention.uniform(batch).to(like.dtype),
        cache=perceiver.empty_cache(batch),
    )


def state_after(inferred: Inference, pick: Callable[[Tensor], Tensor], cache: PerceptionCache | None = None) -> State:
    """The state after one of the inferred frames; `pick` takes it out of [B, T, ...]. Latents, delta and context get no gradient."""
    shape = inferred.hidden.shape[:2]
    flat = (inferred.posterior.mean.detach(), inferred.delta.detach(), inferred.maps.attention)
    latents, delta, attention = (pick(x.unflatten(0, shape)) for x in flat)
    fresh = torch.zeros(shape[0], dtype=torch.bool, device=latents.device)
    return State(pick(inferred.lstm), pick(inferred.hidden), latents, delta, fresh, pick(inferred.context.detach()), attention, cache)


def step(model: nn.Module, frame: Tensor, action: Tensor, state: State, init: Tensor) -> tuple[dict[str, Tensor], State]:
    """One frame, with the posterior.

    Args: frame float [B, 3, H, W]; action [B, A], taken after it; state of the frame before; init bool [B], where an episode begins.

    Returns: (the per-frame outputs of `forward_sequence` without the T axis, the next state).
    """
    given, state = state, _restart(model, state, init)
    codes, posterior, seen = _observe(model, frame, state, init)
    z = sample_latents(posterior.mean, posterior.logvar, model.training)
    after = advance(model, seen, action)
    context_before = seen.context if model.prior_context == "current" else state.context
    prior = model.prior(state.hidden, context_before, state.latents, state.delta, sample=model.training)
    maps = model.attention.posterior(frame, after.hidden, seen.context)
    predicted = model.attention.prior(state.attention, state.hidden, state.latents)
    decoded = model.decoder(z, maps.attention)
    inferred = Inference(posterior, z, seen.delta, prior, seen.context, after.hidden, after.lstm, maps, state.attention, predicted, decoded)
    out = inferred.describe(codes, model.decoder.likelihood, (frame.shape[0],))
    return out, match_layout(after._replace(attention=maps.attention), given)


def observe(model: nn.Module, frame: Tensor, state: State, init: Tensor) -> State:
    """What is known of a frame before its action: the first half of `step`, without attention and pictures.

    Args: as of `step`. Returns: latents, delta, context and cache of this frame, with `hidden`, `lstm` and `attention` of the one before.
    """
    return match_layout(_observe(model, frame, _restart(model, state, init), init)[2], state)


def predict(model: nn.Module, state: State, sample: bool = False, noise: PriorNoise | None = None) -> tuple[Mixture, State]:
    """What is expected of a frame before its action, differentiable: as `observe`, without a frame.

    An imagined frame has no tokens: its context is the mean one. With the context of the last observed frame in every frame of a
    roll-out, roll-outs of held-out episodes were worse (docs/log.md). A sampled latent stands for the mean of q(z), as an observed one
    does: with the noise of q(z) in it, delta would be mostly noise.

    Returns: (prior of z_t; latents, delta and context of this frame, with `hidden`, `lstm` and `attention` of the one before).
    """
    uniform = None if noise is None else noise.sticks
    prior = model.prior(state.hidden, state.context, state.latents, state.delta, sample, uniform, choice_only=True)
    z = prior.sample(sample, noise, model.prior.inferred_variance)
    context = model.perceiver_io.mean_context.to(state.context).expand_as(state.context)
    return prior, state._replace(latents=z, delta=_delta(state, z), fresh=torch.zeros_like(state.fresh), context=context)


def advance(model: nn.Module, state: State, action: Tensor) -> State:
    """The state after the action [B, A] of a frame that `observe` or `predict` gave: `hidden` and `lstm` become those of this frame."""
    x = recurrent_input(state.latents, state.delta, state.context, action).unsqueeze(1)
    hidden, lstm = model.recurrence(x, None, state.lstm)  # `_restart` has emptied the state where needed
    return state._replace(hidden=hidden[:, 0], lstm=lstm[:, 0])


def imagine(
    model: nn.Module, given: Tensor | tuple[Tensor, PriorNoise], state: State, sample: bool = False
) -> tuple[dict[str, Tensor], State]:
    """One frame without observing it: `imagine_latents`, its map, then the decoder.

    With `prior_context="current"` too the prior is given the context of the frame before. The cache of perception stays that of the last
    observed frame.

    Args: given: action [B, A], taken after the imagined frame, alone or with the noise of a sample; state of the frame before; sample:
    sample the prior, otherwise take the mean of the likeliest component.

    Returns: (reconstructions [B, 3, H, W], latents [B, Z], mixture_weights [B, K], attention [B, Ha, Wa] by name, and of the action
    `rewards` [B] and `continues` [B], the probability that its discount is not 0; the next state).
    """
    action, noise = given if isinstance(given, tuple) else (given, None)
    prior, after = imagine_latents(model, action, state, sample, noise)
    log_attention = model.attention.prior(state.attention, state.hidden, state.latents).log_attention
    after = after._replace(attention=log_attention.exp())
    decoded = model.decoder(after.latents, after.attention)
    rewards, continues = model.outcomes.expected(after.hidden, after.latents)
    out = dict(
        reconstructions=model.decoder.likelihood.mean(decoded), latents=after.latents, mixture_weights=prior.log_weights.exp(),
        attention=after.attention, rewards=rewards, continues=continues,
    )  # fmt: skip
    return out, match_layout(after, state)


def imagine_latents(
    model: nn.Module, action: Tensor, state: State, sample: bool = False, noise: PriorNoise | None = None
) -> tuple[Mixture, State]:
    """`imagine` in latent space, differentiable: (prior of z_t, the next state), in which the attention map stays as it is."""
    prior, expected = predict(model, state, sample, noise)
    return prior, advance(model, expected, action)


def _delta(state: State, latents: Tensor) -> Tensor:
    """The latents [B, Z] of this frame minus those of the frame before; 0 where there was none."""
    return torch.where(state.fresh[:, None], 0.0, latents - state.latents)


def _observe(model: nn.Module, frame: Tensor, state: State, init: Tensor) -> tuple[Tensor, Posterior, State]:
    """(codes [B, Ht, Wt, Q], q(z_t), the state as `observe` gives it), from a state that is empty where an episode begins."""
    codes, context, cache = model.perceiver_io.observe(frame.unsqueeze(1), state.cache, init.unsqueeze(1))
    context = context[:, 0]
    posterior = model.encoder(frame, context)
    delta, fresh = _delta(state, posterior.mean), torch.zeros_like(init)
    return codes[:, 0], posterior, state._replace(latents=posterior.mean, delta=delta, fresh=fresh, context=context, cache=cache)


def _restart(model: nn.Module, state: State, init: Tensor) -> State:
    """Empties the state of the batch rows where an episode begins. Perception gets `init` itself, so its cache stays."""
    empty = initial_state(model, init.shape[0])
    names = ("lstm", "hidden", "latents", "delta", "fresh", "context", "attention")
    pairs = {name: (getattr(empty, name), getattr(state, name)) for name in names}
    return state._replace(**{name: torch.where(init.reshape(-1, *(1,) * (old.dim() - 1)), new, old) for name, (new, old) in pairs.items()})
