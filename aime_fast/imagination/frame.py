"""The world model one frame at a time: `step` sees the frame, `imagine` draws it.

Both map a `State` of fixed shape to the next one and cost one frame, however long the video is: perception keeps one product for each
causal convolution and the keys and values of the attention window. `step` is the definition that the parallel path is tested against.
`imagine` looks at nothing: latent, attention and context come from their predictions, so what is drawn never feeds back.
`model` is always the world model, whose methods of the same names are the public ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.generative_prior.dpgmm_prior import Mixture
from aime_fast.inference import Inference, draw_latents, recurrent_input
from aime_fast.perceiver_io.context import Memory
from aime_fast.roll_out import alike


class State(NamedTuple):
    """What one frame leaves for the next. Shapes, dtypes and strides are the same after any number of frames."""

    lstm: Tensor  # [B, layers, 2, Dh], hidden and cell
    hidden: Tensor  # [B, Dh], h_t
    latents: Tensor  # [B, Z], the mean of q(z_t); z_t where it was imagined
    moved: Tensor  # [B, Z], how far that is from the one before
    fresh: Tensor  # bool [B], no frame was there before: nothing has moved
    context: Tensor  # [B, Dc], c_t
    attention: Tensor  # [B, Ha, Wa], A_t
    kept: tuple[Tensor, ...]  # [B, C, h, w] each, of the tokenizer's causal convolutions
    memory: Memory | None  # of the context's attention over time


def initial_state(model: nn.Module, batch: int) -> State:
    """The empty memory before a first frame."""
    like, perceiver = model.decoder.background, model.perceiver_io

    def zeros(width: int) -> Tensor:
        return torch.zeros(batch, width, device=like.device, dtype=like.dtype)

    return State(
        lstm=model.dynamics.initial_state(batch, like.device, like.dtype),
        hidden=zeros(model.dynamics.hidden_dim),
        latents=zeros(model.latent_dim),
        moved=zeros(model.latent_dim),
        fresh=torch.ones(batch, dtype=torch.bool, device=like.device),
        context=zeros(perceiver.out[-1].out_features),
        attention=model.attention.uniform(batch).to(like.dtype),
        kept=perceiver.tokenizer.nothing_kept(batch),
        memory=perceiver.empty_memory(batch),
    )


def state_after(seen: Inference, pick: Callable[[Tensor], Tensor], kept: tuple[Tensor, ...] = (), memory: Memory | None = None) -> State:
    """What one of the inferred frames leaves for the next; `pick` takes it out of [B, T, ...]. Where the latent is gets no gradient."""
    shape = seen.hidden.shape[:2]
    latents, moved, attention = (pick(x.unflatten(0, shape)) for x in (seen.posterior.mean.detach(), seen.moved, seen.maps.attention))
    fresh = torch.zeros(shape[0], dtype=torch.bool, device=latents.device)
    return State(pick(seen.lstm), pick(seen.hidden), latents, moved, fresh, pick(seen.context), attention, kept, memory)


def step(model: nn.Module, frame: Tensor, action: Tensor, state: State, init: Tensor) -> tuple[dict[str, Tensor], State]:
    """One frame, with the posterior.

    Args: frame float [B, 3, H, W]; action [B, A], taken after it; state of the frame before; init bool [B], where an episode begins.

    Returns: (the per-frame outputs of `forward_sequence` without the T axis, the next state).
    """
    given, state = state, _restart(model, state, init)
    codes, context, kept, memory = model.perceiver_io.observe(frame.unsqueeze(1), state.kept, state.memory, init.unsqueeze(1))
    codes, context = codes[:, 0], context[:, 0]
    posterior = model.encoder(frame, context)
    z = draw_latents(posterior.mean, posterior.logvar, model.training)
    mean = posterior.mean.detach()  # as in `world_model._infer`: the prior must not pull the latent to where it is easy to go on from
    moved = _movement(state, mean)
    hidden, lstm = _recur(model, mean, moved, context, action, state.lstm)
    context_before = context if model.prior_context == "current" else state.context
    prior = model.prior(state.hidden, context_before, state.latents, state.moved, sample=model.training)
    maps = model.attention.look(frame, hidden, context)
    expected = model.attention.expect(state.attention, state.hidden, state.latents)
    drawn = model.decoder(z, maps.attention)
    seen = Inference(posterior, z, moved, prior, context, hidden, lstm, maps, state.attention, expected, drawn)
    out = seen.describe(codes, model.decoder.likelihood, (frame.shape[0],))
    return out, alike(State(lstm, hidden, mean, moved, torch.zeros_like(init), context, maps.attention, kept, memory), given)


def imagine(model: nn.Module, action: Tensor, state: State, sample: bool = False) -> tuple[dict[str, Tensor], State]:
    """One frame without seeing it: latent and attention from their priors, the context from its own prediction, the frame drawn.

    With `prior_context="current"` too the prior is given c_{t-1}: c_t is predicted only after z_t. What perception keeps (`kept`,
    `memory`) stays that of the last frame seen.

    Args: action [B, A], taken after the imagined frame; state of the frame before; sample: draw from the priors, otherwise the mean of
    the likeliest component.

    Returns: (reconstructions [B, 3, H, W], latents [B, Z], mixture_weights [B, K], attention [B, Ha, Wa] by name; the next state).
    """
    p, _, following = dream(model, action, state, sample)
    drawn = model.decoder(following.latents, following.attention)
    out = dict(
        reconstructions=model.decoder.likelihood.mean(drawn), latents=following.latents, mixture_weights=p.log_weights.exp(),
        attention=following.attention,
    )  # fmt: skip
    return out, alike(following, state)


def dream(
    model: nn.Module, action: Tensor, state: State, sample: bool = False, attends: bool = True
) -> tuple[Mixture, Tensor | None, State]:
    """`imagine` without the drawing, differentiable: (prior of z_t, log of the expected attention [B, Ha, Wa], the next state).

    Where it does not attend, the map stays as it was and its log is None. Drawn latents move by their noise too, which training, where
    movement is that of means, does not show the prior.
    """
    p = model.prior(state.hidden, state.context, state.latents, state.moved, sample=sample)
    z = p.sample(sample)
    log_attention = model.attention.expect(state.attention, state.hidden, state.latents).log_attention if attends else None
    context = model.expect_context(state.hidden, state.context, z)
    moved = _movement(state, z)
    hidden, lstm = _recur(model, z, moved, context, action, state.lstm)
    following = state._replace(
        lstm=lstm, hidden=hidden, latents=z, moved=moved,
        fresh=torch.zeros_like(state.fresh), context=context, attention=log_attention.exp() if attends else state.attention,
    )  # fmt: skip
    return p, log_attention, following


def _movement(state: State, latents: Tensor) -> Tensor:
    """How far the latents [B, Z] of this frame are from those of the frame before; 0 where there was none."""
    return torch.where(state.fresh[:, None], 0.0, latents - state.latents)


def _recur(model: nn.Module, latents: Tensor, moved: Tensor, context: Tensor, action: Tensor, lstm: Tensor) -> tuple[Tensor, Tensor]:
    x = recurrent_input(latents, moved, context, action).unsqueeze(1)
    going_on = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)  # `_restart` has emptied the state where needed
    hidden, lstm = model.dynamics(x, going_on, lstm)
    return hidden[:, 0], lstm[:, 0]


def _restart(model: nn.Module, state: State, init: Tensor) -> State:
    """Empties the memory of the batch rows where an episode begins, but for perception, which is told of it."""
    empty = initial_state(model, init.shape[0])
    names = ("lstm", "hidden", "latents", "moved", "fresh", "context", "attention")
    pairs = {name: (getattr(empty, name), getattr(state, name)) for name in names}
    return state._replace(**{name: torch.where(init.reshape(-1, *(1,) * (old.dim() - 1)), new, old) for name, (new, old) in pairs.items()})
