"""Latent overshooting: one frame ahead and rolled out, scored in the space of latents, without a picture.

What `overshooting` does in a joint update, for sequences whose latents were inferred before. Source: Hafner et al., arXiv 1811.04551.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.attention_schema.schema import attention_kl
from aime_fast.imagination import State, dream
from aime_fast.inference import draw_latents, foretell
from aime_fast.layers import previous, starts
from aime_fast.multi_task_learning.losses import mixture_log_prob
from aime_fast.overshooting import SEEN

SEED_WEIGHT = 10.0  # of the squared error of the slots' seeds


class Latents(NamedTuple):
    """What was inferred about B sequences of T frames."""

    mean: Tensor  # [B, T, Z]
    logvar: Tensor  # [B, T, Z]
    context: Tensor  # [B, T, Dc]
    actions: Tensor  # [B, T, A]
    attention: Tensor  # [B, T, Ha, Wa]
    seeds: Tensor  # [B, T, S, Ds], of the slots


@torch.no_grad()
def infer_latents(model: nn.Module, pixels: Tensor, actions: Tensor) -> Latents:
    """What a model in eval mode infers about frames uint8 [B, T, 3, H, W] with their actions [B, T, A]."""
    seen = model.infer(pixels, actions)
    seeds = model.attention.posterior.seeds(seen.hidden, seen.context)
    flat = (seen.posterior.mean, seen.posterior.logvar, seen.maps.attention)
    mean, logvar, attention = (x.unflatten(0, actions.shape[:2]) for x in flat)
    return Latents(mean, logvar, seen.context, actions, attention, seeds)


def latent_overshoot(model: nn.Module, seen: Latents, frames: int, attends: bool) -> dict[str, Tensor]:
    """Scores `frames` imagined frames after a random one, the same for the whole batch, and each frame from the one before.

    The slots' seeds, which read h, are held to what they were: where the model looks does not change as the recurrence does.

    Args: seen, one episode a sequence; frames, at least 1 and below T; attends: score attention too, which costs more than all the rest.

    Returns: scalars, to be added: of the latent `one_step`, `sticks`, `rolled_out`, then `context`; and where it attends `attention`,
    `attention_rolled_out` and `seeds`. All but the last are nats a frame.
    """
    batch, length = seen.mean.shape[:2]
    start = starts(None, batch, length, seen.mean.device)
    latents = draw_latents(seen.mean, seen.logvar, True)
    told = foretell(model, seen.mean, seen.context, seen.actions, start, sample=True)
    terms = {"one_step": _nll(latents.flatten(0, 1), told.prior).mean(), "sticks": told.prior.kl_hierarchical.mean()}
    if attends:
        before = previous(seen.attention, start, model.attention.uniform(1)).flatten(0, 1)
        expected = model.attention.expect(before, told.hidden_before, told.latents_before)
        terms["attention"] = attention_kl(seen.attention.flatten(0, 1), expected.log_attention).mean()
        terms["seeds"] = SEED_WEIGHT * F.mse_loss(model.attention.posterior.seeds(told.hidden, seen.context), seen.seeds)

    first = int(torch.randint(min(SEEN - 1, length - frames - 1), length - frames, (1,)))
    state = State(
        lstm=told.lstm[:, first], hidden=told.hidden[:, first], latents=seen.mean[:, first], moved=told.moved[:, first],
        fresh=torch.zeros(batch, dtype=torch.bool, device=start.device), context=seen.context[:, first],
        attention=seen.attention[:, first], kept=(), memory=None,
    )  # fmt: skip
    scores: dict[str, list[Tensor]] = {"rolled_out": [], "context": []} | ({"attention_rolled_out": []} if attends else {})
    for t in range(first + 1, first + frames + 1):
        prior, log_attention, state = dream(model, seen.actions[:, t], state, attends=attends)
        scores["rolled_out"].append(_nll(latents[:, t], prior))
        scores["context"].append(0.5 * (state.context - seen.context[:, t]).square().sum(-1))
        if attends:
            scores["attention_rolled_out"].append(attention_kl(seen.attention[:, t], log_attention))
    return terms | {name: torch.stack(parts).mean() for name, parts in scores.items()}


def _nll(latents: Tensor, prior) -> Tensor:
    return -mixture_log_prob(latents, prior.log_weights, prior.means, prior.logvars)
