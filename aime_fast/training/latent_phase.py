"""The latent phase: after the joint updates, trains the recurrence and the priors alone, on latents inferred once.

Nearly all of the cost of a joint update is pictures. Prediction needs thousands of long roll-outs through a small recurrence; without
pictures an update costs a tenth. So the averaged weights infer the latents of the whole training set, and recurrence, mixture prior,
context prior and attention prior go on training on them. Source of the two stages: Ha and Schmidhuber, arXiv 1803.10122.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from aime_fast.config import OptimConfig
from aime_fast.data import SequenceBatches
from aime_fast.errors import ConfigError, NonFiniteError
from aime_fast.imagination.overshooting import latent_overshooting
from aime_fast.imagination.sequence import Latents, infer_latents
from aime_fast.training.schedules import Every

CONTEXT = 8  # observed frames before the first imagined one, at most: as many as in the evaluation
ATTENDS_EVERY = 8  # one update in this many scores attention too, on a quarter of the sequences: it costs more than all the rest
WARMUP = 20  # updates in which the learning rate rises
CLIP = 1.0  # global gradient norm
REPORTS = 20  # lines that a phase writes


class _Stopped(Exception):
    """The run is to end while latents are inferred."""


class LatentReplay:
    """`Latents` of every episode of `batches`, each inferred as one sequence, in fp32 whatever the run's precision.

    Args: model in eval mode; batches with at least one episode of `length` frames; `stopped` is asked before each episode.
    Raises _Stopped once `stopped()` is true.
    """

    def __init__(self, model: nn.Module, batches: SequenceBatches, length: int, stopped: Callable[[], bool] = lambda: False):
        inferred = []
        for i in range(len(batches.episodes)):
            if stopped():
                raise _Stopped
            episode = batches.episode(i).unsqueeze(0)
            inferred.append(infer_latents(model, episode["pixels"], episode["action"]))
        self.length, self.frames = length, Latents(*(torch.cat(parts, dim=1)[0] for parts in zip(*inferred)))
        ends = itertools.accumulate(batches.lengths)
        firsts = [torch.arange(end - n, max(end - n, end - length + 1)) for end, n in zip(ends, batches.lengths)]
        self.firsts = torch.cat(firsts).to(self.frames.mean.device)

    def draw(self, batch: int) -> Latents:
        """`batch` random sequences of `length` frames."""
        first = self.firsts[torch.randint(len(self.firsts), (batch, 1), device=self.firsts.device)]
        return Latents(*(part[first + torch.arange(self.length, device=first.device)] for part in self.frames))


def check_lengths(optim: OptimConfig, *parts: SequenceBatches) -> None:
    """Raises ConfigError where one of the parts has no episode as long as a sequence of the phase."""
    frames, longest = optim.latent_phase_frames, min(max(part.lengths) for part in parts)
    if optim.latent_phase_updates and CONTEXT + frames > longest:
        raise ConfigError(
            f"--latent-phase-frames {frames}: with {CONTEXT} frames before them longer than any held-out or training episode "
            f"({longest} frames); take fewer, or --latent-phase-updates 0"
        )


def trained_modules(model: nn.Module) -> nn.ModuleDict:
    """The modules that the phase trains: recurrence and priors, and the slots' seeds, which read h."""
    attention = model.attention
    return nn.ModuleDict(
        dict(
            recurrence=model.recurrence, prior=model.prior, context_prior=model.context_prior,
            attention_prior=attention.prior, attention_seed=attention.posterior.seed,
        )
    )  # fmt: skip


class LatentPhase:
    """Trains `model` in place, with Adam at a cosine rate.

    Args:
        model: in eval mode, without gradients; `close` leaves it so.
        training, held_out: episodes as the model infers them.
        optim: its fields `latent_phase_*` are read.

    Attributes: made: updates made; updates: to be made.
    """

    def __init__(self, model: nn.Module, training: LatentReplay, held_out: LatentReplay, optim: OptimConfig):
        self.model, self.training, self.held_out = model, training, held_out
        self.made, self.updates = 0, optim.latent_phase_updates
        self.batch, self.frames = optim.latent_phase_batch_size, optim.latent_phase_frames
        self.learning_rate = optim.latent_phase_learning_rate
        self.modules = trained_modules(model).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.modules.parameters())

    def update(self) -> None:
        """One update of the weights. Raises NonFiniteError, before the weights change, where a gradient is not finite."""
        falling = 0.5 * (1 + math.cos(math.pi * self.made / self.updates))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, (self.made + 1) / WARMUP) * falling
        attends = self.made % ATTENDS_EVERY == 0
        sequences = self.training.draw(max(1, self.batch // 4) if attends else self.batch)
        terms = latent_overshooting(self.model, sequences, self.frames, attends)
        self.optimizer.zero_grad()
        sum(terms.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.modules.parameters(), CLIP)
        self._check_finite(norm, terms)
        self.optimizer.step()
        self.made += 1

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The terms of `latent_overshooting` on the same held-out sequences each time."""
        with torch.random.fork_rng([self.training.firsts.device] if self.training.firsts.is_cuda else []):
            torch.manual_seed(0)
            terms = latent_overshooting(self.model, self.held_out.draw(4 * self.batch), self.frames, attends=True)
        return {name: term.item() for name, term in terms.items()}

    def close(self) -> None:
        """Leaves the model without gradients."""
        self.optimizer.zero_grad()
        self.modules.requires_grad_(False)

    def _check_finite(self, norm: Tensor, terms: dict[str, Tensor]) -> None:
        if not torch.isfinite(norm):
            bad = ", ".join(name for name, term in terms.items() if not torch.isfinite(term)) or "gradient"
            raise NonFiniteError(
                f"latent phase, update {self.made + 1}: {bad} not finite; the checkpoint from before the phase is intact: go on "
                "from it with --resume and a lower --latent-phase-learning-rate"
            )


def train_latent_phase(
    model: nn.Module,
    training: SequenceBatches,
    held_out: SequenceBatches,
    optim: OptimConfig,
    report: Callable[[int, dict[str, float]], None],
    stopped: Callable[[], bool],
) -> dict[str, Tensor] | None:
    """A whole latent phase on `model`, in place, with torch's current random numbers.

    Args:
        model: in eval mode, without gradients.
        training, held_out: episodes.
        optim: its fields `latent_phase_*` are read.
        report: called some 20 times with the updates made and the measures of held-out episodes.
        stopped: asked before each update; once true, the phase ends and the weights are those from before it.

    Returns:
        the weights of `trained_modules` from before the phase, by name; None if it was stopped.
    """
    modules = trained_modules(model)
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    length = CONTEXT + optim.latent_phase_frames
    try:
        phase = LatentPhase(model, *(LatentReplay(model, batches, length, stopped) for batches in (training, held_out)), optim)
    except _Stopped:
        return None
    should_report = Every(max(1, phase.updates // REPORTS))
    while phase.made < phase.updates and not stopped():
        phase.update()
        if should_report(phase.made) or phase.made == phase.updates:
            report(phase.made, phase.measure())
    phase.close()
    if phase.made < phase.updates:
        modules.load_state_dict(before)
        return None
    return before
