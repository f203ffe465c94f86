"""The dynamics phase: recurrence and priors trained alone, on latents that the finished perception inferred once.

Nearly all of a joint update is pictures. What prediction needs, thousands of roll-outs through a small recurrence, costs a twentieth of
it when the pictures are left out: after the last joint update the averaged weights infer the whole training set, perception and drawing
stay as they are, and what foretells (LSTM, mixture prior, context prior, attention prior) is trained on, at twice the joint roll-out's
length and more. Source of the order, first see and then foretell: Ha and Schmidhuber, arXiv 1803.10122.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from aime_fast.data import SequenceBatches
from aime_fast.latent_overshooting import Latents, infer_latents, latent_overshoot

SHOWN = 8  # frames before the last of which a roll-out begins, at most: the convention of the evaluation
ATTENDS_EVERY = 8  # the attention prior, costlier than all the rest, learns in one update of so many, from a quarter of the sequences
WARMUP = 20  # updates in which the learning rate rises
CLIP = 1.0  # global gradient norm


class LatentReplay:
    """Every episode of `batches` as a model infers it, each in one piece.

    Args: model in eval mode; batches with at least one episode of `length` frames.
    """

    def __init__(self, model: nn.Module, batches: SequenceBatches, length: int):
        episodes = (batches.episode(i).unsqueeze(0) for i in range(len(batches.episodes)))
        inferred = [infer_latents(model, episode["pixels"], episode["action"]) for episode in episodes]
        self.length, self.frames = length, Latents(*(torch.cat(parts, dim=1)[0] for parts in zip(*inferred)))
        ends = itertools.accumulate(batches.lengths)
        firsts = [torch.arange(end - n, max(end - n, end - length + 1)) for end, n in zip(ends, batches.lengths)]
        self.firsts = torch.cat(firsts).to(self.frames.mean.device)

    def draw(self, batch: int) -> Latents:
        """`batch` random sequences of `length` frames."""
        first = self.firsts[torch.randint(len(self.firsts), (batch, 1), device=self.firsts.device)]
        return Latents(*(part[first + torch.arange(self.length, device=first.device)] for part in self.frames))


class DynamicsPhase:
    """Trains `model` in place, with Adam at a cosine rate.

    Args:
        model: in eval mode, without gradients; it is given back so by `close`.
        training, held_out: episodes as the model infers them.
        updates, batch, frames, learning_rate: how many updates, sequences in each, imagined frames, Adam's rate.
    """

    def __init__(
        self, model: nn.Module, training: LatentReplay, held_out: LatentReplay, updates: int, batch: int, frames: int, learning_rate: float
    ):
        self.model, self.training, self.held_out = model, training, held_out
        self.updates, self.batch, self.frames = updates, batch, frames
        attention = model.attention
        self.parts = nn.ModuleList([model.dynamics, model.prior, model.expect_context, attention.prior, attention.posterior.seed])
        self.parts.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parts.parameters())
        self.learning_rate = learning_rate
        self.made = 0

    def update(self) -> None:
        """One update of the weights."""
        falling = 0.5 * (1 + math.cos(math.pi * self.made / self.updates))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, (self.made + 1) / WARMUP) * falling
        attends = self.made % ATTENDS_EVERY == 0
        sequences = self.training.draw(max(1, self.batch // 4) if attends else self.batch)
        terms = latent_overshoot(self.model, sequences, self.frames, attends)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        torch.nn.utils.clip_grad_norm_(self.parts.parameters(), CLIP)
        self.optimizer.step()
        self.made += 1

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The terms of `latent_overshoot` on held-out sequences."""
        terms = latent_overshoot(self.model, self.held_out.draw(4 * self.batch), self.frames, attends=True)
        return {name: term.item() for name, term in terms.items()}

    def close(self) -> None:
        """No gradients any more."""
        self.parts.requires_grad_(False)
