"""The dynamics phase: what foretells is trained alone, on latents that the finished perception inferred once.

Nearly all of a joint update is pictures. What prediction needs, thousands of long roll-outs through a small recurrence, costs a tenth of
it when the pictures are left out: after the last joint update the averaged weights infer the whole training set, and LSTM, mixture prior,
context prior and attention prior are trained on. First see, then foretell: Ha and Schmidhuber, arXiv 1803.10122.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from aime_fast.config import OptimConfig
from aime_fast.data import SequenceBatches
from aime_fast.latent_overshooting import Latents, infer_latents, latent_overshoot
from aime_fast.training.faults import NonFiniteError

SHOWN = 8  # frames before the first imagined one, at most: as many as the evaluation shows
ATTENDS_EVERY = 8  # one update of so many scores attention too, and takes a quarter of the sequences, for it costs more than all the rest
WARMUP = 20  # updates in which the learning rate rises
CLIP = 1.0  # global gradient norm


class LatentReplay:
    """Every episode of `batches` as a model infers it, each in one piece; in full precision whatever the run's.

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


def foretelling_parts(model: nn.Module) -> nn.ModuleDict:
    """The parts that the phase trains: those that foretell, and the slots' seeds, which read h."""
    attention = model.attention
    return nn.ModuleDict(
        dict(
            dynamics=model.dynamics, prior=model.prior, expect_context=model.expect_context,
            attention_prior=attention.prior, attention_seed=attention.posterior.seed,
        )
    )  # fmt: skip


class DynamicsPhase:
    """Trains `model` in place, with Adam at a cosine rate.

    Args:
        model: in eval mode, without gradients; `close` leaves it so.
        training, held_out: episodes as the model infers them.
        optim: its fields `dynamics_*` are read.

    Attributes: made: updates made; updates: to be made.
    """

    def __init__(self, model: nn.Module, training: LatentReplay, held_out: LatentReplay, optim: OptimConfig):
        self.model, self.training, self.held_out = model, training, held_out
        self.made, self.updates, self.batch, self.frames = 0, optim.dynamics_updates, optim.dynamics_batch_size, optim.dynamics_frames
        self.learning_rate = optim.dynamics_learning_rate
        self.parts = foretelling_parts(model).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parts.parameters())

    def update(self) -> None:
        """One update of the weights. Raises NonFiniteError, before the weights change, where a gradient is not finite."""
        falling = 0.5 * (1 + math.cos(math.pi * self.made / self.updates))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, (self.made + 1) / WARMUP) * falling
        attends = self.made % ATTENDS_EVERY == 0
        sequences = self.training.draw(max(1, self.batch // 4) if attends else self.batch)
        terms = latent_overshoot(self.model, sequences, self.frames, attends)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parts.parameters(), CLIP)
        self._check_finite(norm, terms)
        self.optimizer.step()
        self.made += 1

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The terms of `latent_overshoot` on the same held-out sequences each time."""
        with torch.random.fork_rng([self.training.firsts.device] if self.training.firsts.is_cuda else []):
            torch.manual_seed(0)
            terms = latent_overshoot(self.model, self.held_out.draw(4 * self.batch), self.frames, attends=True)
        return {name: term.item() for name, term in terms.items()}

    def close(self) -> None:
        """No gradients any more."""
        self.optimizer.zero_grad()
        self.parts.requires_grad_(False)

    def _check_finite(self, norm: Tensor, terms: dict[str, Tensor]) -> None:
        if not torch.isfinite(norm):
            bad = ", ".join(name for name, term in terms.items() if not torch.isfinite(term)) or "gradient"
            raise NonFiniteError(
                f"dynamics phase, update {self.made + 1}: {bad} not finite; the checkpoint from before the phase is whole: go on "
                "from it with --resume and a lower --dynamics-learning-rate"
            )
