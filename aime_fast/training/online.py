"""OnlineTrainer: play, learn the world model, learn to act in what it imagines, and again.

A run is a list of cycles. A cycle is a function of the checkpoint before it, of its number and of the episodes on the disk, so a run
that stops anywhere goes on from its last whole cycle as if it had not been stopped:

    play       episodes, by --policy in the first cycle, then by the actor with its noise
    perceive   picture steps and joint updates of the world model, as in a run on recorded data
    predict    updates of the latent phase, on the averaged weights and the latents that they infer; the model goes on with them
    act        updates of actor and critic, in imagination
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from aime_fast.bounds import check
from aime_fast.config import PICTURE_SHARE, Config, to_dict
from aime_fast.control.policy import WorldModelPolicy
from aime_fast.data import SequenceBatches
from aime_fast.data.collectors import recording_attributes
from aime_fast.data.environments import describe_task, probe_renderer
from aime_fast.data.growing import GrowingReplay
from aime_fast.data.noise import NoisePolicy
from aime_fast.data.replay import replay_bytes
from aime_fast.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from aime_fast.evaluation.collapse import Watch, replay
from aime_fast.evaluation.outcomes import explained_reward
from aime_fast.evaluation.validation import validate
from aime_fast.runtime.compile_cache import save_compiled
from aime_fast.runtime.lock import FolderLock
from aime_fast.runtime.machine import WAYS
from aime_fast.training import checkpoint
from aime_fast.training.behaviour import BURN_IN, PER_PIECE, Behaviour, draw_starts
from aime_fast.training.faults import MAX_SKIPS, Faults
from aime_fast.training.interrupts import StopSignals
from aime_fast.training.latent_phase import CONTEXT, MEASURED, LatentPhase, LatentReplay, trained_modules
from aime_fast.training.logging import Console, Logger, write_run_files
from aime_fast.training.metrics import ResumePoint, read_rows
from aime_fast.training.playing import Played, SecondPlayer, record
from aime_fast.training.schedules import Schedules
from aime_fast.training.settings import default_run_dir, prepare_machine
from aime_fast.training.step import TrainingStep, on_device
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

LEAST_LATENT_RATE = 0.2  # of the latent phase, as a share of its first: there are new episodes to the end
SHOWN = ("play/return", "behaviour/imagined_return", "behaviour/entropy", "validation/reward_explained", "validation/psnr")


class _Stopped(Exception):
    """A signal has come in the middle of a cycle."""


class OnlineTrainer:
    """Trains a world model and a policy on a task, from no data.

    Args: config: the whole run; `control` says how long and how often. `run.resume` goes on after the last whole cycle.

    Attributes: run_dir; step: updates of the world model; frames: agent steps played; cycle: cycles done.

    Raises: as `DMCVBTrainer`.
    """

    def __init__(self, config: Config):
        run = config.run
        check(config)
        if config.data.data is not None:
            raise ConfigError(f"--data {config.data.data}: --online records its own episodes; leave it out, or train without --online")
        self.device, self.compile = prepare_machine(run)
        self.run_dir = Path(run.run_dir or default_run_dir(config))
        self.lock = FolderLock(self.run_dir)
        try:
            self._prepare(config)
        except BaseException:
            self.lock.release(discard=True)
            raise

    def _prepare(self, config: Config) -> None:
        run = config.run
        self.saved, resumed = checkpoint.find_resume(self.run_dir, run.resume)
        self.config = config = dataclasses.replace(config, run=dataclasses.replace(run, run_dir=str(self.run_dir)))
        if resumed is not None:
            with checkpoint.fitting(self.saved):
                checkpoint.check_same_config(resumed["config"], config)
        backend = probe_renderer()
        task = describe_task(config.data)
        self.action_dim, self.longest = task.action_dim, task.longest
        check_control(config, self.longest)
        self.wanted = math.ceil(config.control.environment_frames / config.data.frame_skip)  # agent steps
        if self.device.type == "cpu" or config.data.replay == "host":
            check_room(config, self.wanted, self.action_dim)
        folder = self.run_dir / "episodes"
        if not run.resume and any(folder.glob("episode_*.h5")):
            raise ConfigError(f"{folder} holds episodes of another run; name another folder with --run-dir, or move it away")
        seeds = config.control.seed_episodes * self.longest * config.data.frame_skip
        if config.control.environment_frames < seeds:
            raise ConfigError(
                f"--environment-frames {config.control.environment_frames}: fewer than those of --seed-episodes "
                f"{config.control.seed_episodes}, {seeds}; give more of the one or fewer of the other"
            )
        attributes = recording_attributes(config.data, run.seed, task, backend, "actor")
        self.replay = GrowingReplay(folder, config.data, attributes, resumed["episodes"] if resumed else 0)
        self.picture_share = PICTURE_SHARE if config.data.stills and config.optim.picture_steps != 0 else 0.0
        self.frames_per_step = config.data.batch_size * config.data.sequence_length * config.optim.accumulate
        planned, seed_steps = _planned_steps(config, self.longest, self.frames_per_step)
        self.planned_joint = max(1, round(planned * (1 - self.picture_share)))
        self.all_from = round(config.control.latent_updates * seed_steps)  # the actor imagines all frames from the first cycle on
        self.optim = dataclasses.replace(
            config.optim, latent_phase_updates=max(1, round(config.control.latent_updates * planned)),
            latent_phase_frames=config.control.imagination_horizon, ema_decay=config.control.average_decay,
        )  # fmt: skip
        torch.manual_seed(run.seed)
        self.model = DPGMMVariationalRecurrentAutoencoder.from_config(config, self.action_dim).to(self.device)
        self.training_step = TrainingStep(self.model, dataclasses.replace(config, optim=self.optim), self.compile)
        self.ema = self.training_step.ema.model
        way = WAYS[self.compile]
        self.captures = way.captured
        self.behaviour = Behaviour(self.ema, config.control, way.captured, way.regions)
        self.cycle = self.step = self.joint = self.frames = self.skipped = 0
        self.second = SecondPlayer(self.replay, run.seed) if config.control.plays_beside else None
        self.acting: str | None = None  # name of the checkpoint whose policy plays the next episodes beside; None: this process will
        self.seconds, self.latent_phase, self.logged = 0.0, {}, None
        self.stop = StopSignals()
        if resumed is not None:
            self._load(resumed)

    def train(self) -> dict:
        """Runs until `environment_frames` were played. Returns `run_dir`, `checkpoint` and `step`.

        Raises: Interrupted after a signal: the run goes on after its last whole cycle. NonFiniteError, OSError as `DMCVBTrainer.train`.
        """
        try:
            with self.stop:
                self._open()
                while self.frames < self.wanted:
                    began = time.perf_counter()
                    row = self._run_cycle()
                    self.seconds += time.perf_counter() - began
                    self.cycle += 1
                    played = self.frames * self.config.data.frame_skip
                    row |= {"time": self.seconds, "environment_frames": played, "skipped_updates": self.skipped}
                    self.console.line(
                        f"cycle {self.cycle}, {played} environment frames, {self.step} steps, {self.seconds / 60:.1f} min: "
                        + ", ".join(f"{name} {row[name]:.4g}" for name in SHOWN if name in row)
                    )
                    for finding in self.watch.look(self.step, row):
                        self.console.line(str(finding))
                    self.logger.log(self.step, row | self.watch.flags())
                    self.console.advance(self.frames)
                    self._save()
                if self.config.run.compile_cache is not None:
                    save_compiled(self.config.run.compile_cache)
            return {"run_dir": self.run_dir, "checkpoint": self.saved, "step": self.step}
        except _Stopped:
            last = checkpoint.last_good(self.saved, self.run_dir)
            raise Interrupted(
                self.stop.signum, f"stopped in cycle {self.cycle}, which is lost; {last}; go on with the same command and --resume"
            ) from None
        finally:
            self._close()

    def _run_cycle(self) -> dict[str, float]:
        """One cycle; returns what is logged of it."""
        control, data, optim = self.config.control, self.config.data, self.config.optim
        self._seed(0)
        played = self._play()
        batches, validation = self.replay.batches(self.config.run.seed + self.cycle, self.device)
        try:
            if self.cycle == 0:
                for model in (self.model, self.ema):
                    model.initialise_background(batches.mean_frame().to(self.device))
                self.schedules = Schedules(self.optim, max(1.0, batches.steps_per_epoch / optim.accumulate), self.planned_joint)
            ratio = control.train_ratio if self.cycle else control.seed_train_ratio
            steps = max(1, round(ratio * played.frames / self.frames_per_step))
            row = played.row(data.frame_skip)
            self._seed(1)
            row |= self._perceive(batches, steps)
            self._seed(2)
            latents, measured = self._predict(batches, validation, steps)
            self._seed(3)
            row |= measured | self._act(latents, steps)
            self._seed(0)
            row |= self._validate(validation)
        finally:
            batches.close()
            validation.close()
        return row

    def _play(self) -> Played:
        """The episodes of this cycle, which are in the replay then."""
        control, seed = self.config.control, self.config.run.seed
        if self.cycle == 0:
            noise = partial(NoisePolicy, self.config.data.policy, self.action_dim)
            played = record(self.replay, noise, seed, control.seed_episodes, self._stop_if_asked)
            if not played.rewards_differ:
                self.console.line(
                    "no reward of the seed episodes differs from another: nothing can be learnt; record more with --seed-episodes"
                )
        elif self.acting is None:
            policy = WorldModelPolicy(self.ema, self.behaviour.actor)
            played = record(self.replay, lambda: policy, seed, self._episodes_left(), self._stop_if_asked)
        else:
            if not self.second.plays:  # the run has just been resumed
                self.second.begin(self.run_dir / self.acting, self._episodes_left())
            played = self.second.finish(self._stop_if_asked)
        self.frames += played.frames
        self.acting = None
        if self.second is not None and self.cycle > 0 and (left := self._episodes_left()):
            self.acting = self.saved.name
            self.second.begin(self.saved, left)
        return played

    def _episodes_left(self) -> int:
        """How many episodes the next cycle plays."""
        return min(self.config.control.cycle_episodes, math.ceil(max(0, self.wanted - self.frames) / self.longest))

    def _perceive(self, batches: SequenceBatches, steps: int) -> dict[str, float]:
        """Picture steps, then joint updates."""
        began, pictures = time.perf_counter(), round(self.picture_share * steps)
        metrics = {}
        for made in range(steps):
            self._stop_if_asked()
            of_step = [next(batches) for _ in range(self.config.optim.accumulate)]
            given = self.schedules.picture(self.step) if made < pictures else self.schedules.joint(self.joint)
            update = self.training_step.learn_pictures if made < pictures else self.training_step
            metrics |= update(of_step, **on_device(given, self.device)).to_dict()
            self.step += 1
            self.joint += made >= pictures
        self.skipped = self._check(self.training_step.faults, "the world model", "a lower --learning-rate")
        seconds = time.perf_counter() - began
        numbers = {name: float(value) for name, value in metrics.items() if name != "finite"}
        return numbers | {"perceive/seconds": seconds, "perceive/frames_per_second": steps * self.frames_per_step / seconds}

    def _predict(self, batches: SequenceBatches, validation: SequenceBatches, steps: int) -> tuple[LatentReplay, dict[str, float]]:
        """Infers the latents of all episodes, then updates of the latent phase; returns (latents to train on, what is logged)."""
        began = time.perf_counter()
        length = max(CONTEXT + self.optim.latent_phase_frames, BURN_IN + PER_PIECE)
        training, held_out = (LatentReplay(self.ema, part, length) for part in (batches, validation))
        inferred = time.perf_counter()
        phase = LatentPhase(
            self.ema, training, held_out, self.optim, self.config.run.seed, self.captures, self.config.loss.lambda_outcome,
            outcome_share=1.0, all_from=self.all_from, least_rate=LEAST_LATENT_RATE,
        )  # fmt: skip
        if self.latent_phase:
            phase.load_state_dict(self.latent_phase)
        for _ in range(round(self.config.control.latent_updates * steps)):
            self._stop_if_asked()
            phase.update()
        phase.check()
        measured = {f"latent_phase/{name}": value for name, value in phase.measure().items()}
        phase.close()
        self.latent_phase = phase.state_dict()
        self.training_step.ema.adopt(trained_modules(self.ema), trained_modules(self.model))
        explained = explained_reward(self.ema, held_out.draw(MEASURED, BURN_IN + PER_PIECE))
        seconds = {"infer/seconds": inferred - began, "predict/seconds": time.perf_counter() - inferred}
        return training, measured | {"validation/reward_explained": explained} | seconds

    def _act(self, latents: LatentReplay, steps: int) -> dict[str, float]:
        """Updates of actor and critic."""
        began, control = time.perf_counter(), self.config.control
        totals: dict[str, torch.Tensor] = {}
        count = round(control.policy_updates * steps)
        self.behaviour.calm(min(1.0, self.frames / self.wanted))
        for _ in range(count):
            self._stop_if_asked()
            start = draw_starts(self.ema, latents, control.imagination_starts)
            for name, value in self.behaviour.update(start).items():
                totals[name] = totals.get(name, 0.0) + value / count
        self._check(self.behaviour.faults, "actor and critic", "a lower --actor-lr or --critic-lr")
        return {f"behaviour/{name}": float(value) for name, value in totals.items()} | {"act/seconds": time.perf_counter() - began}

    def _validate(self, validation: SequenceBatches) -> dict[str, float]:
        """Measures of the averaged weights on held-out episodes."""
        few = self.config.run.validation_batches
        background, codes = self.model.encoder.background, self.config.model.codebook_size
        measured = validate(self.ema, validation.one_pass(few), self.training_step.losses, background, codes, few)
        return {f"validation/{name}": value for name, value in measured.items()}

    def _check(self, faults: Faults, what: str, remedy: str) -> int:
        """Updates skipped so far. Raises NonFiniteError where one was and the run is to stop at it, or too many in a row were."""
        report = faults.read()
        if report.in_a_row >= MAX_SKIPS or (report.terms and self.config.run.on_nan == "stop"):
            last, terms = checkpoint.last_good(self.saved, self.run_dir), ", ".join(report.terms) or "many updates"
            raise NonFiniteError(
                f"{what}, cycle {self.cycle}: {terms} not finite; {last}. Go on from there with --resume and {remedy}, or with --on-nan "
                "skip to pass over such updates"
            )
        return report.skipped

    def _seed(self, part: int) -> None:
        """Random numbers of a part of a cycle: the same whether or not the run was stopped before."""
        torch.manual_seed((self.config.run.seed * 1_000_003 + self.cycle) * 4 + part)

    def _stop_if_asked(self) -> None:
        if self.stop.signum is not None:
            raise _Stopped

    def _save(self) -> None:
        dropped = self.replay.oldest(self.config.control.replay_frames)
        config = dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, data=str(self.replay.folder)))
        state = {
            "epoch": 0.0, "cycle": self.cycle, "joint": self.joint, "frames": self.frames, "seconds": self.seconds,
            "episodes": self.replay.next_number, "logged": self.logger.rows,
            "acting": self.acting, "latent_phase": None, "latents": self.latent_phase, "behaviour": self.behaviour.state_dict(),
            "updates_per_epoch": self.schedules.updates_per_epoch,
            "action_dim": self.action_dim, "config": to_dict(config),
            "split": {part: list(names) for part, names in self.replay.split(dropped)._asdict().items()},
            **self.training_step.state_dict(),
        }  # fmt: skip
        checkpoint.check_finite(state, self.step)
        self.saved = checkpoint.save_checkpoint(self.run_dir, self.step, state, self.config.run.keep_checkpoints)
        self.replay.drop(dropped)

    def _load(self, state: dict) -> None:
        if state.get("action_dim") != self.action_dim:
            raise CheckpointError(f"--resume: the checkpoint is for {state.get('action_dim')} actions, the task has {self.action_dim}")
        with checkpoint.fitting(self.saved):
            self.training_step.load_state_dict(state)
            self.behaviour.load_state_dict(state["behaviour"])
            self.cycle, self.joint, self.frames, self.step = (int(state[name]) for name in ("cycle", "joint", "frames", "step"))
            self.seconds, self.latent_phase = float(state["seconds"]), state["latents"]
            self.logged, self.acting = state["logged"], state["acting"] if self.second is not None else None
            self.schedules = Schedules(self.optim, float(state["updates_per_epoch"]), self.planned_joint)
        if self.acting is not None and not (self.run_dir / self.acting).is_file():
            raise CheckpointError(
                f"--resume: {self.run_dir / self.acting}, whose policy plays the next episodes, is missing; add --no-plays-beside"
            )
        self.replay.drop(self.replay.oldest(self.config.control.replay_frames))  # the run may have ended between saving and this

    def _open(self) -> None:
        self.console = Console(self.wanted, self.frames, on_lost=self.stop.request)
        facts = {
            "compile": self.compile, "parameters": sum(p.numel() for p in self.model.parameters()), "from_step": self.step,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
        }  # fmt: skip
        write_run_files(self.run_dir, self.config, facts, self.saved is not None, self.console.line)
        self.logger = Logger(self.run_dir, self.config, ResumePoint(self.step, self.logged), self.console.line)
        self.watch = Watch(self.config.model.latent_dim, self.config.model.max_components)
        replay(self.watch, read_rows(self.run_dir))
        skip = self.config.data.frame_skip
        self.console.line(
            f"online: {self.config.data.domain} {self.config.data.task}, environment frames {self.frames * skip} to {self.wanted * skip}, "
            f"{facts['parameters'] / 1e6:.1f} M parameters on {facts['device']}, into {self.run_dir}"
        )

    def _close(self) -> None:
        for opened in (self.second, getattr(self, "console", None), getattr(self, "logger", None)):
            if opened is not None:
                opened.close()
        self.lock.release()


def check_control(config: Config, longest: int) -> None:
    """Raises ConfigError where an episode of `longest` agent steps is shorter than what is learnt from it, or too few checkpoints stay."""
    horizon, frames = config.control.imagination_horizon, config.data.sequence_length
    if max(CONTEXT + horizon, BURN_IN + PER_PIECE) > longest:
        raise ConfigError(
            f"--imagination-horizon {horizon}: with {CONTEXT} frames before it longer than an episode of {longest} agent steps; take a "
            "smaller one, or a smaller --frame-skip"
        )
    if frames > longest:
        raise ConfigError(
            f"--sequence-length {frames}: longer than an episode of {longest} agent steps; take fewer, or a smaller --frame-skip"
        )
    if config.control.plays_beside and config.run.keep_checkpoints < 2:
        raise ConfigError(
            "--keep-checkpoints 1: with --plays-beside the next episodes are played by the last checkpoint but one; keep 2 or more"
        )


def check_room(config: Config, wanted: int, action_dim: int) -> None:
    """Raises ConfigError where the unpacked episodes of a run of `wanted` agent steps will not fit into the temporary folder's disk."""
    folder, data = Path(tempfile.gettempdir()), config.data
    frames = min(wanted, config.control.replay_frames + math.ceil(wanted * data.validation_fraction))
    needed, free = replay_bytes(frames, data.image_size, action_dim), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"--replay-frames {config.control.replay_frames}: {frames} agent steps need {needed / 2**30:.3g} GiB unpacked, {folder} has "
            f"{free / 2**30:.3g} free; give fewer, or set TMPDIR to a folder on a disk with more room"
        )


def _planned_steps(config: Config, longest: int, frames_per_step: int) -> tuple[int, int]:
    """Updates of the world model that the run will make, about, and those of its first cycle, where no episode ends early."""
    control, data = config.control, config.data
    total = control.environment_frames / data.frame_skip
    seeds = min(total, control.seed_episodes * longest)
    first = control.seed_train_ratio * seeds / frames_per_step
    return max(1, round(first + control.train_ratio * (total - seeds) / frames_per_step)), round(first)
