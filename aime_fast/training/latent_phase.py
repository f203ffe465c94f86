"""The latent phase: after the joint updates, trains the recurrence and the priors alone, on inferred latents.

Nearly all of the cost of a joint update is pictures. Prediction needs thousands of long roll-outs through a small recurrence; without
pictures an update costs a fraction. So the averaged weights infer the latents of the whole training set, and recurrence, mixture prior
and attention prior go on training on pieces of them. Every other update imagines samples, so that the
places that a sampled film comes to are known. Source of the two stages: Ha and Schmidhuber, arXiv 1803.10122.

Update n draws its random numbers from a seed of its own: a phase goes on from any update as if it had not been stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aime_fast.config import OptimConfig
from aime_fast.data import SequenceBatches
from aime_fast.errors import ConfigError, NonFiniteError
from aime_fast.imagination.overshooting import latent_overshooting
from aime_fast.imagination.sequence import Latents, infer_latents
from aime_fast.runtime import ranks
from aime_fast.runtime.cuda_graph import Graphs
from aime_fast.training.adam import Adam, clip_factor
from aime_fast.training.arena import Arena, GradientRows
from aime_fast.training.faults import Faults
from aime_fast.training.schedules import Every

CONTEXT = 8  # observed frames before the first imagined one, at most: as many as in the evaluation
ATTENDS_EVERY = 7  # one update in this many, odd, so with and without samples, scores attention too, on a quarter of the pieces: it is dear
WARMUP = 20  # updates in which the learning rate rises
FIRST_SHARE = 0.15  # of the frames, imagined in the first update
ALL_FROM = 0.6  # share of the updates after which all frames are imagined, where nothing else is said
STAGES = 6  # numbers of imagined frames in between
CLIP = 1.0  # global gradient norm
REPORTS = 20  # lines that a phase writes
MEASURED = 128  # held-out pieces of a measure
CHOOSES = "rolled_out"  # the measure whose least value says which weights are kept
AT_ONCE = 1000  # frames of an episode inferred at once, at most
BETAS = (0.9, 0.95)  # of Adam: the gradients of longer roll-outs are of another size
# Of a loss, as they are computed.
TERMS = ("one_step", "sticks", "outcome", "attention", "seeds", "rolled_out", "outcome_rolled_out", "attention_rolled_out")
OUTCOMES = ("outcome", "outcome_rolled_out")
OUTCOME_SHARE = 1 / 8  # of the pieces whose outcomes are scored, where nobody acts by them: of all, an update would take 15 % longer
GRADIENT = "gradient"


class _Stopped(Exception):
    """The run is to end while latents are inferred."""


class LatentReplay:
    """`Latents` of every frame of the episodes of `batches` that have `length` frames, in fp32 whatever the run's precision.

    An episode is inferred as one sequence, in parts where it is long. The recurrence of the phase begins anew in each piece; the context of
    its first frames remembers some before it. The processes of a run infer every Nth episode each, and all have the latents of all.

    Args: model in eval mode; batches with at least one episode of `length` frames; where `limit` says how many pieces will be drawn, only
    as many episodes as hold so many are inferred, spread over all; `stopped` is asked before each. Raises _Stopped once it is true.

    Attributes: frames: `Latents` [F, ...] of the frames of all episodes, one after the other; lengths: int64 [E], frames of each.
    """

    def __init__(
        self, model: nn.Module, batches: SequenceBatches, length: int, limit: int | None = None, stopped: Callable[[], bool] = lambda: False
    ):
        episodes = [i for i, frames in enumerate(batches.lengths) if frames >= length]
        if limit is not None:
            count = min(len(episodes), math.ceil(limit * length * len(episodes) / sum(batches.lengths[i] for i in episodes)))
            episodes = [episodes[len(episodes) * k // count] for k in range(count)]
        self.lengths = torch.tensor([batches.lengths[i] for i in episodes])
        own = ranks.of_run() if len(episodes) >= ranks.of_run().size else ranks.Ranks()
        inferred = []
        for first in range(0, len(episodes), own.size):  # of each process one, so that all ask as often whether to stop
            if stopped():
                raise _Stopped
            for i in episodes[first : first + own.size][own.rank : own.rank + 1]:
                episode = batches.episode(i)
                brought = (episode[name].squeeze(-1) for name in ("reward", "discount"))
                parts = zip(*(x[None].split(AT_ONCE, 1) for x in (episode["pixels"], episode["action"], *brought)))
                inferred += [infer_latents(model, *part) for part in parts]
        fields = [[part[0] for part in parts] for parts in zip(*inferred)]
        inferred.clear()  # what is joined is freed field by field: all of it lies on the device
        self.frames = Latents(*(ranks.gathered(torch.cat(fields.pop(0)), self.lengths, own) for _ in Latents._fields))
        self._lengths = self.lengths.to(self.device)

    def draw(self, batch: int, length: int) -> Latents:
        """`batch` random pieces of `length` frames of an episode, [B, length, ...]; every place of every episode is as likely.

        Where ranks share a batch, B is this one's share of it.
        """
        place = ranks.own(torch.randint(int((self.lengths - length + 1).sum()), (batch,), device=self.device)).contiguous()
        episode = torch.searchsorted((self._lengths - length + 1).cumsum(0), place, right=True)
        first = place + episode * (length - 1)  # so many frames of each episode before begin no piece
        rows = first[:, None] + torch.arange(length, device=self.device)
        return Latents(*(part[rows] for part in self.frames))

    def draw_beginnings(self, batch: int, length: int) -> Latents:
        """The first `length` frames of `batch` random episodes, [B, length, ...]."""
        first = self._lengths.cumsum(0) - self._lengths
        chosen = first[torch.randint(len(first), (batch,), device=self.device)]
        return Latents(*(part[chosen[:, None] + torch.arange(length, device=self.device)] for part in self.frames))

    @property
    def device(self) -> torch.device:
        """Of the frames."""
        return self.frames.mean.device


def check_lengths(optim: OptimConfig, *parts: SequenceBatches) -> None:
    """Raises ConfigError where one of the parts has no episode as long as a piece with all imagined frames."""
    frames, longest = optim.latent_phase_frames, min(max(part.lengths) for part in parts)
    if optim.latent_phase_updates and CONTEXT + frames > longest:
        raise ConfigError(
            f"--latent-phase-frames {frames}: with {CONTEXT} frames before them longer than any held-out or training episode "
            f"({longest} frames); take fewer, or --latent-phase-updates 0"
        )


def trained_modules(model: nn.Module) -> nn.ModuleDict:
    """The modules that the phase trains: recurrence, priors, and the outcome heads and the slots' seeds, which read h."""
    attention = model.attention
    modules = dict(recurrence=model.recurrence, prior=model.prior, outcomes=model.outcomes)
    return nn.ModuleDict(modules | dict(attention_prior=attention.prior, attention_seed=attention.posterior.seed))


def attending_pieces(batch: int) -> int:
    """How many pieces an update has that scores attention too, where others have `batch`."""
    return max(1, batch // 4)


class Kind(NamedTuple):
    """What an update of the phase does. Each kind is captured by itself."""

    frames: int  # imagined
    attends: bool  # attention is scored too
    sample: bool  # samples are imagined


def falling(made: float) -> float:
    """Share of the learning rate where a share of the updates is made: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * made))


class LatentPhase:
    """Trains `model` in place, with Adam at a cosine rate. An update whose loss or gradient is not finite changes nothing.

    The weights that it trains move into memory of its own: if they are averages, no `EMA.update` may follow but after `EMA.adopt`.

    Args:
        model: in eval mode, without gradients; `close` leaves it so.
        training, held_out: frames as the model infers them, of which pieces of CONTEXT and all imagined frames can be drawn.
        optim: its fields `latent_phase_*` are read.
        seed: of all random numbers.
        captures: each kind of update is a CUDA graph, and the host learns of what is not finite in `check` alone.
        outcome_weight: of the outcomes' terms; 0: they are not computed.
        outcome_share: of the pieces whose outcomes are scored.
        all_from: updates after which all frames are imagined; None: `ALL_FROM` of all updates.
        least_rate: share of the learning rate below which it does not fall.

    Attributes: made: updates made; updates: to be made.
    """

    def __init__(
        self, model: nn.Module, training: LatentReplay, held_out: LatentReplay, optim: OptimConfig, seed: int = 0, captures: bool = False,
        outcome_weight: float = 1.0, outcome_share: float = OUTCOME_SHARE, all_from: int | None = None, least_rate: float = 0.0,
    ):  # fmt: skip
        self.model, self.training, self.held_out, self.seed = model, training, held_out, seed
        self.made, self.updates = 0, optim.latent_phase_updates
        self.batch, self.frames = optim.latent_phase_batch_size, optim.latent_phase_frames
        self.outcome_weight, self.outcome_share = outcome_weight, outcome_share if outcome_weight else 0.0
        self.learning_rate, self.least_rate = optim.latent_phase_learning_rate, least_rate
        self.all_from = ALL_FROM * self.updates if all_from is None else all_from
        self.modules = trained_modules(model).requires_grad_(True)
        arena = Arena(self.modules.parameters())
        self._row = GradientRows(arena, 1)
        self.optimizer = Adam(arena.flat, *BETAS)
        self.faults = Faults((*TERMS, GRADIENT), training.device)
        self.graphs = Graphs(training.device) if captures else None
        model.prior.inferred_variance.copy_(training.frames.logvar.mean(0).exp())

    def update(self) -> None:
        """One update of the weights. Raises NonFiniteError as `check`, unless updates are captured."""
        share = max(self.least_rate, falling(min(1.0, self.made / self.updates)))
        rate = torch.full((), self.learning_rate * min(1.0, (self.made + 1) / WARMUP) * share, device=self.training.device)
        kind = Kind(self._imagined(), self.made % ATTENDS_EVERY == 0, self.made % 2 == 1)
        with self._random_numbers(self.made + 1), ranks.sharing():
            pieces = self.training.draw(attending_pieces(self.batch) if kind.attends else self.batch, CONTEXT + kind.frames)
            learn = partial(self._learn, kind)
            if self.graphs is not None:
                self.graphs.keep(lambda other: other.frames == kind.frames)  # those of fewer imagined frames do not come back
                learn = self.graphs.of(kind, learn)
            learn(pieces, rate)
        self.made += 1
        if self.graphs is None:
            self.check()

    def _learn(self, kind: Kind, pieces: Latents, rate: Tensor) -> None:
        """An update from pieces [B, CONTEXT + frames, ...] at a learning rate, a scalar; reads nothing back to the host."""
        terms = latent_overshooting(self.model, pieces, *kind, self.outcome_share)
        loss = sum(self.outcome_weight * term if name in OUTCOMES else term for name, term in terms.items())
        gradient = ranks.average_(self._row.gather({"latent phase": loss})[0])
        norm = torch.linalg.vector_norm(gradient)
        finite = self.faults.record(ranks.means({name: term.detach() for name, term in terms.items()}) | {GRADIENT: norm})
        self.optimizer.update(gradient * clip_factor(norm, CLIP), rate, finite)

    def check(self) -> None:
        """Raises NonFiniteError where a loss or gradient was not finite since the last check. Waits for the device."""
        report = self.faults.read()
        if report.terms:
            raise NonFiniteError(
                f"latent phase, update {self.made - report.ago}: {', '.join(report.terms)} not finite; the checkpoint has the weights from "
                "before the phase too: --resume with a lower --latent-phase-learning-rate begins the phase again"
            )

    def _imagined(self) -> int:
        """Frames that this update imagines: few at first, which shows what an action does, all of them after `all_from` updates.

        Their number grows in steps, since each has graphs of its own.
        """
        share = min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * self.made / max(1, self.all_from))
        step = math.ceil(self.frames / STAGES)
        return min(self.frames, max(1, round(share * self.frames / step)) * step) if share < 1 else self.frames

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The terms of `latent_overshooting` on the same held-out pieces each time."""
        with self._random_numbers(0):
            terms = latent_overshooting(self.model, self.held_out.draw(MEASURED, CONTEXT + self.frames), self.frames, attends=True)
        return {name: term.item() for name, term in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """Updates made and Adam's state; the weights are the model's."""
        return {"update": self.made, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.made = state["update"]
        self.optimizer.load_state_dict(state["optimizer"])

    @contextmanager
    def _random_numbers(self, update: int) -> Iterator[None]:
        """Within it, torch's random numbers are those of an update; 0: of the measures."""
        device = self.training.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed * 1_000_003 + update)
            yield

    def close(self) -> None:
        """Leaves the model without gradients."""
        self.modules.requires_grad_(False)


def train_latent_phase(
    model: nn.Module,
    training: SequenceBatches,
    held_out: SequenceBatches,
    optim: OptimConfig,
    seed: int,
    state: dict[str, Any],
    report: Callable[[int, dict[str, float], int], None],
    due: Callable[[int], bool],
    save: Callable[[], None],
    stopped: Callable[[], bool],
    captures: bool = False,
    outcome_weight: float = 1.0,
) -> None:
    """A latent phase on `model`, in place.

    Args:
        model: in eval mode, without gradients; half-way through the phase where `state` says so.
        training, held_out: episodes.
        optim: its fields `latent_phase_*` and `keep_best_latent_phase` are read.
        seed: of all random numbers.
        state: of the phase: `before`, the weights of `trained_modules` before it, and `progress`, what `LatentPhase.state_dict` gave
            ({} where it begins). Up to date at every call of `save`; `progress` is None when the phase is done. With
            `optim.keep_best_latent_phase` there is `best`: the `update` after which held-out roll-outs cost least so far, what they cost,
            and until the phase is done the `weights`.
        report: called some 20 times with the updates made, the measures of held-out episodes, and the best update so far, or 0.
        due: whether to save after so many updates.
        save: called where it is due, and at the end.
        stopped: asked before each update; once true, the phase ends after `save`.
        captures, outcome_weight: see `LatentPhase`.
    """
    modules, length = trained_modules(model), CONTEXT + optim.latent_phase_frames
    now = {name: value.clone() for name, value in modules.state_dict().items()}
    modules.load_state_dict(state["before"])  # latents are always those of the weights before the phase
    try:
        drawn = optim.latent_phase_updates * optim.latent_phase_batch_size  # a short phase needs no more
        replays = [LatentReplay(model, batches, length, max(MEASURED, drawn), stopped) for batches in (training, held_out)]
    except _Stopped:
        return
    finally:
        modules.load_state_dict(now)
    phase = LatentPhase(model, *replays, optim, seed, captures, outcome_weight)
    if state["progress"]:
        phase.load_state_dict(state["progress"])
    should_report = Every(max(1, phase.updates // REPORTS))
    try:
        while phase.made < phase.updates and not stopped():
            phase.update()
            if should_report(phase.made) or phase.made == phase.updates:
                phase.check()
                measured = phase.measure()
                if optim.keep_best_latent_phase and measured[CHOOSES] < state.get("best", {CHOOSES: math.inf})[CHOOSES]:
                    weights = {name: value.clone() for name, value in modules.state_dict().items()}
                    state["best"] = {"update": phase.made, CHOOSES: measured[CHOOSES], "weights": weights}
                report(phase.made, measured, state.get("best", {"update": 0})["update"])
            state["progress"] = phase.state_dict()
            if phase.made < phase.updates and due(phase.made):
                phase.check()
                save()
        phase.check()
    finally:
        phase.close()
    if phase.made == phase.updates:
        if "best" in state:
            modules.load_state_dict(state["best"].pop("weights"))
        state["progress"] = None
    save()
