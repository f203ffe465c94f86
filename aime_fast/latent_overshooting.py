"""Latent overshooting: one frame ahead and rolled out, scored in the space of latents, without a picture.

What `overshooting` does in a joint update, for sequences whose latents were inferred before: thousands of such updates cost what dozens
of the others do. Source: Hafner et al., arXiv 1811.04551.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.attention_schema.schema import attention_kl
from aime_fast.encoder_decoder.encoder import Posterior
from aime_fast.imagination import State, dream
from aime_fast.inference import draw_latents, recurrent_input
from aime_fast.layers import previous, starts
from aime_fast.multi_task_learning.losses import mixture_log_prob

EARLIEST = 2  # index of the first frame from which a roll-out begins: three frames show speed and its change
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
    """Terms in nats a frame: of the latent `one_step`, `sticks` and `rolled_out`, of the `context`; where it attends also of attention.

    The roll-out of `frames` frames begins after a random frame, the same for the whole batch; the last possible leaves no frame over.
    The slots' seeds are held to what they were, so that where the model looks does not change as the recurrence does.
    """
    batch, length = seen.mean.shape[:2]
    start = starts(None, batch, length, seen.mean.device)
    before = previous(seen.mean, start)
    moved = torch.where(start[..., None], 0.0, seen.mean - before)
    hidden, lstm = model.dynamics(recurrent_input(seen.mean, moved, seen.context, seen.actions), start)
    hidden_before, context_before, moved_before = (previous(x, start).flatten(0, 1) for x in (hidden, seen.context, moved))
    latents = draw_latents(Posterior(seen.mean, seen.logvar, None), True)
    prior = model.prior(hidden_before, context_before, before.flatten(0, 1), moved_before)
    terms = {"one_step": -mixture_log_prob(latents.flatten(0, 1), prior.log_weights, prior.means, prior.logvars).mean()}
    terms["sticks"] = prior.kl_hierarchical.mean()
    if attends:
        attention_before = previous(seen.attention, start, model.attention.uniform(1)).flatten(0, 1)
        log_attention = model.attention.expect(attention_before, hidden_before, before.flatten(0, 1)).log_attention
        terms["attention"] = attention_kl(seen.attention.flatten(0, 1), log_attention).mean()
        terms["seeds"] = SEED_WEIGHT * F.mse_loss(model.attention.posterior.seeds(hidden, seen.context), seen.seeds)

    first = int(torch.randint(min(EARLIEST, length - frames - 1), length - frames, (1,)))
    fresh = torch.zeros(batch, dtype=torch.bool, device=start.device)
    here = (x[:, first] for x in (lstm, hidden, seen.mean, moved))
    state = State(*here, fresh, seen.context[:, first], seen.attention[:, first], (), None)
    errors = []
    for t in range(first + 1, first + frames + 1):
        prior, log_attention, state = dream(model, seen.actions[:, t], state, attends=attends)
        nll = -mixture_log_prob(latents[:, t], prior.log_weights, prior.means, prior.logvars)
        context = 0.5 * (state.context - seen.context[:, t]).square().sum(-1)
        errors.append([nll, context] + ([attention_kl(seen.attention[:, t], log_attention)] if attends else []))
    means = (torch.stack(error).mean() for error in zip(*errors))
    return terms | dict(zip(("rolled_out", "context", "attention_rolled_out"), means))
