"""Overshooting: a roll-out of a few imagined frames from an inferred state, scored against what was inferred from the true frames.

In one-step training the priors never get a state that they produced; in open-loop prediction they get no other. One loop,
`imagine_and_score`, serves two uses: `pixel_overshooting` in a joint update, which decodes the imagined frames too, and
`latent_overshooting` in the latent phase, for pieces of episodes whose latents were inferred before. Targets get no gradient, nor do
latent, delta and context where a roll-out begins: the posterior gets one through the recurrence alone. Source: latent overshooting
(Hafner et al., arXiv 1811.04551), here with pixels too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.attention_schema.schema import attention_kl
from aime_fast.imagination.frame import State, imagine_latents, state_after
from aime_fast.imagination.sequence import Inference, Latents, predict_latents, sample_latents
from aime_fast.layers import previous, starts
from aime_fast.multi_task_learning.loss_aggregator import OVERSHOOT
from aime_fast.multi_task_learning.losses import mixture_log_prob
from aime_fast.runtime import ranks, streams

BURN_IN = 3  # frames up to the first state, where the sequence is long enough: the fewest that show speed and its change
SEED_WEIGHT = 10.0  # of the squared error of the slots' seeds


class Targets(NamedTuple):
    """What a roll-out over B sequences of T frames is scored against, and the actions that it is given."""

    latents: Tensor  # [B, T, Z], samples of the posterior
    attention: Tensor  # [B, T, Ha, Wa]
    actions: Tensor  # [B, T, A]
    brought: tuple[Tensor, Tensor] | None = None  # reward and discount [S, T] of each action of the first S sequences


def imagine_and_score(
    model: nn.Module, state: State, first: Tensor, frames: int, targets: Targets, attends: bool = True, sample: bool = False
) -> tuple[dict[str, Tensor], list[Tensor], Tensor | None]:
    """Imagines `frames` frames from `state`, the state after frame `first`.

    Latents are scored by the weights and means of the prior and by `prior.spread`, which may grow with every frame that is imagined.
    The widths of the components say what a single frame adds, and learn from observed frames and from where sampled roll-outs go: made
    as wide as a whole roll-out strays, a sampled film would stray that far in each of its frames. The sticks of these weights are not
    those by which a sample chose its components.

    Args: first int64 [1], on the device: a captured graph may choose another at each replay; attends: predict attention too; sample: the
    imagined latents, where they are not the means of the likeliest components.

    Returns: (scores in nats, `latent` and where it attends `attention`, [frames, B] each, and `outcome` [frames, S] where the targets have
    one; the imagined latents [B, Z] of each frame; the log of the predicted maps [frames, B, Ha, Wa], None where it does not attend).
    """
    priors, imagined, hidden, log_maps = [], [], [], []

    def attend(seen: Tensor, hidden: Tensor, latents: Tensor) -> None:
        before = log_maps[-1].exp() if log_maps else seen
        log_maps.append(model.attention.prior(before, hidden, latents).log_attention)

    attended = None
    for action in _after(targets.actions, first, frames).unbind():
        if attends:  # latents do not wait for maps
            attended = streams.beside("imagined attention", attend, state.attention, state.hidden, state.latents)
        prior, state = imagine_latents(model, action, state, sample)
        priors.append(prior)
        imagined.append(state.latents)
        hidden.append(state.hidden)
    # Of all frames at once: on a processor so small an operator costs as much as one of all.
    features = torch.stack([prior.features for prior in priors])
    uniform = model.prior.sticks.uniform(features.shape[:-1], features, dim=1) if sample else None
    log_weights = model.prior.sticks(features, uniform, sample).log_pi
    means = torch.stack([prior.means for prior in priors])
    latents = _after(targets.latents, first, frames)
    scores = {"latent": -mixture_log_prob(latents, log_weights, means, model.prior.spread(features).unsqueeze(-2))}
    if targets.brought is not None:
        reward, discount = (_after(x, first, frames) for x in targets.brought)
        known = (torch.stack(part)[:, : reward.shape[1]] for part in (hidden, imagined))
        scores["outcome"] = sum(model.outcomes.score(*known, reward, discount))
    if not attends:
        return scores, imagined, None
    attended()
    streams.record(log_maps)
    log_attention = torch.stack(log_maps)
    scores["attention"] = attention_kl(_after(targets.attention, first, frames), log_attention)
    return scores, imagined, log_attention


def pixel_overshooting(
    model: nn.Module, inferred: Inference, video: Tensor, actions: Tensor, start: Tensor, frames: int
) -> dict[str, Tensor]:
    """Scores min(frames, T - 1) imagined frames after a random one, the same for the whole batch, and their decoded pictures.

    Args: inferred from B*T frames; video [B, T, 3, H, W] in [-1, 1]; actions [B, T, A]; start bool [B, T].

    Returns: the terms `OVERSHOOT`, in nats a frame, means over imagined frames that lie in the episode of the first; 0 where T is 1.
    """
    length = start.shape[1]
    frames = min(frames, length - 1)
    if frames < 1:
        return {name: video.new_zeros(()) for name in OVERSHOOT}
    first = _first_frame(length, frames, start.device)
    latents, attention = (x.unflatten(0, start.shape) for x in (inferred.latents, inferred.maps.attention))
    state = state_after(inferred, lambda x: _at(x, first))
    targets = Targets(latents.detach(), attention.detach(), actions)
    scores, imagined, log_attention = imagine_and_score(model, state, first, frames, targets)

    truth = _after(video, first, frames).flatten(0, 1)  # [frames * B, 3, H, W]
    in_episode = (~_after(start, first, frames)).cumprod(0)  # [frames, B], 0 from the next episode on
    weight = in_episode.flatten().to(scores["latent"].dtype)
    share = weight / ranks.mean(weight.sum()).clamp_min(1.0 / ranks.size())
    decoded = model.decoder(torch.cat(imagined), log_attention.exp().flatten(0, 1))
    recon = model.decoder.likelihood.nll(decoded, truth)
    # One by one: gradients of a term taken from a stack of all would pass, as zeros, through all others.
    return dict(zip(OVERSHOOT, ((score.flatten() * share).sum() for score in (recon, scores["latent"], scores["attention"]))))


def latent_overshooting(
    model: nn.Module, inferred: Latents, frames: int, attends: bool, sample: bool = False, outcome_share: float = 1.0
) -> dict[str, Tensor]:
    """Scores `frames` imagined frames after a random one, the same for the whole batch, and observed frames predicted from the one before.

    The latter are as many as may come before the last roll-out that fits, and one more; where it attends, all.

    The slots' seeds, which read h, are trained towards those that were inferred: attention moves little as the recurrence changes.

    Args: inferred, each sequence of one episode; frames, from 1 to T - 1; attends: score attention too, at more than the cost of
    all the rest; sample: the imagined latents; outcome_share: of the sequences whose reward and continuation are scored.

    Returns: scalars, to be added: of the latent `one_step`, `sticks` and `rolled_out`; of reward and continuation, unless of none,
    `outcome` and, where nothing is sampled, `outcome_rolled_out`; where it attends `attention`, `attention_rolled_out` and `seeds`. All
    but the last are nats a frame.
    """
    batch, length = inferred.mean.shape[:2]
    latents = sample_latents(inferred.mean, inferred.logvar, True)
    first = _first_frame(length, frames, latents.device)
    observed = Latents(*(x[:, : length if attends else length - frames + 1] for x in inferred))
    start = starts(None, *observed.mean.shape[:2], latents.device)
    predicted = predict_latents(model, observed.mean, observed.context, observed.actions, start, sample=True)
    prior = predicted.prior
    log_prob = mixture_log_prob(latents[:, : start.shape[1]].flatten(0, 1), prior.log_weights, prior.means, prior.logvars)
    terms = {"one_step": -log_prob.mean(), "sticks": prior.kl_hierarchical.mean()}
    whole = math.ceil(outcome_share * batch * ranks.size())  # sequences whose outcomes are scored, of which this rank may have fewer
    scored = len(range(ranks.rank(), whole, ranks.size()))
    if whole:
        parts = (predicted.hidden, observed.mean, observed.reward, observed.discount)
        terms["outcome"] = sum(model.outcomes.score(*(x[:scored] for x in parts))).mean(1).sum() * ranks.size() / whole
    if attends:
        before = previous(observed.attention, start, model.attention.uniform(1)).flatten(0, 1)
        attention = model.attention.prior(before, predicted.hidden_before, predicted.latents_before)
        terms["attention"] = attention_kl(observed.attention.flatten(0, 1), attention.log_attention).mean()
        seeds = model.attention.posterior.seeds(predicted.hidden, observed.context)
        terms["seeds"] = SEED_WEIGHT * F.mse_loss(seeds, observed.seeds)

    parts = (predicted.lstm, predicted.hidden, observed.mean, predicted.delta, observed.context, observed.attention)
    lstm, hidden, mean, delta, context, attention = (_at(x, first) for x in parts)
    fresh = torch.zeros(batch, dtype=torch.bool, device=start.device)
    state = State(lstm, hidden, mean, delta, fresh, context, attention, cache=None)
    brought = None
    if whole and not sample:  # what was recorded is not what a sample brings
        brought = inferred.reward[:scored], inferred.discount[:scored]
    targets = Targets(latents, inferred.attention, inferred.actions, brought)
    scores, *_ = imagine_and_score(model, state, first, frames, targets, attends, sample)
    names = {"latent": "rolled_out", "outcome": "outcome_rolled_out", "attention": "attention_rolled_out"}
    terms |= {names[name]: score.mean() for name, score in scores.items() if name != "outcome"}
    if "outcome" in scores:
        terms[names["outcome"]] = scores["outcome"].mean(0).sum() * ranks.size() / whole
    return terms


def _first_frame(length: int, frames: int, device: torch.device) -> Tensor:
    """A random frame with BURN_IN - 1 before it, where the length allows, and `frames` after it: int64 [1]."""
    return torch.randint(min(BURN_IN - 1, length - frames - 1), length - frames, (1,), device=device)


def _at(x: Tensor, time: Tensor) -> Tensor:
    """The frame `time` [1] of x: [B, T, ...] -> [B, ...]."""
    return x.index_select(1, time)[:, 0]


def _after(x: Tensor, first: Tensor, frames: int) -> Tensor:
    """The `frames` frames after frame `first` [1] of x: [B, T, ...] -> [frames, B, ...]."""
    return x.index_select(1, first + torch.arange(1, frames + 1, device=first.device)).transpose(0, 1)
