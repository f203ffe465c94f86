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
import time
from functools import partial
from pathlib import Path

import torch

from aime_fast.bounds import check
from aime_fast.config import PICTURE_SHARE, Config, to_dict
from aime_fast.control.policy import WorldModelPolicy
from aime_fast.data.collectors import NoisePolicy, recording_attributes
from aime_fast.data.environments import describe_task, probe_renderer
from aime_fast.data.growing import GrowingReplay
from aime_fast.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from aime_fast.evaluation.collapse import Watch, replay
from aime_fast.evaluation.outcomes import explained_reward
from aime_fast.evaluation.validation import validate
from aime_fast.runtime.lock import FolderLock
from aime_fast.runtime.machine import WAYS, choose_compile, choose_device, choose_kernels, choose_tf32, keep_freed_memory
from aime_fast.training import checkpoint
from aime_fast.training.behaviour import BURN_IN, PER_PIECE, Behaviour
from aime_fast.training.interrupts import StopSignals
from aime_fast.training.latent_phase import CONTEXT, MEASURED, LatentPhase, LatentReplay, trained_modules
from aime_fast.training.logging import Console, Logger, check_loggers, write_run_files
from aime_fast.training.metrics import ResumePoint, read_rows
from aime_fast.training.playing import Played, SecondPlayer, record
from aime_fast.training.schedules import Schedules
from aime_fast.training.settings import default_run_dir
from aime_fast.training.step import TrainingStep
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

MAX_SKIPS = 20  # updates that were not finite, in a row
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
        self.device = choose_device(run.device)
        choose_kernels(run.kernels)
        choose_tf32(run.tf32, run.precision)
        self.compile = choose_compile(run.compile, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        check_loggers(run.logger)
        if run.threads is not None:
            torch.set_num_threads(run.threads)
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
        self.action_dim, self.longest, positions = describe_task(config.data)
        seeds = config.control.seed_episodes * self.longest * config.data.frame_skip
        if config.control.environment_frames < seeds:
            raise ConfigError(
                f"--environment-frames {config.control.environment_frames}: fewer than those of --seed-episodes "
                f"{config.control.seed_episodes}, {seeds}; give more of the one or fewer of the other"
            )
        attributes = recording_attributes(config.data, run.seed, self.action_dim, positions, backend, "actor")
        self.replay = GrowingReplay(self.run_dir / "episodes", config.data, attributes, resumed["episodes"] if resumed else 0)
        self.planned, seed_steps = _planned_steps(config, self.longest)
        self.all_from = round(config.control.latent_updates * seed_steps)  # the actor imagines all frames from the first cycle on
        self.optim = dataclasses.replace(
            config.optim, latent_phase_updates=max(1, round(config.control.latent_updates * self.planned)),
            latent_phase_frames=config.control.imagination_horizon, ema_decay=config.control.average_decay,
        )  # fmt: skip
        torch.manual_seed(run.seed)
        self.model = DPGMMVariationalRecurrentAutoencoder.from_config(config, self.action_dim).to(self.device)
        self.training_step = TrainingStep(self.model, dataclasses.replace(config, optim=self.optim), self.compile)
        self.ema = self.training_step.ema.model
        self.captures = WAYS[self.compile].captured
        self.behaviour = Behaviour(self.ema, config.control, self.captures)
        self.cycle = self.step = self.joint = self.frames = self.resumed_cycle = 0
        self.second = SecondPlayer(self.replay, run.seed) if config.control.plays_beside else None
        self.acting: Path | None = None  # the checkpoint whose policy plays the next episodes beside
        self.seconds, self.latent_phase, self.logged = 0.0, {}, None
        self.returns: list[float] = []
        self.stop = StopSignals()
        if resumed is not None:
            self._load(resumed)

    def train(self) -> dict:
        """Runs until `environment_frames` were played. Returns `run_dir`, `checkpoint`, `returns` (of the last episodes) and `step`.

        Raises: Interrupted after a signal: the run goes on after its last whole cycle. NonFiniteError, OSError as `DMCVBTrainer.train`.
        """
        wanted = math.ceil(self.config.control.environment_frames / self.config.data.frame_skip)
        try:
            with self.stop:
                self._open(wanted)
                while self.frames < wanted:
                    began = time.perf_counter()
                    row = self._run_cycle()
                    self.seconds += time.perf_counter() - began
                    self.cycle += 1
                    row |= {"time": self.seconds, "environment_frames": self.frames * self.config.data.frame_skip}
                    for finding in self.watch.look(self.step, row):
                        self.console.line(str(finding))
                    self.logger.log(self.step, row | self.watch.flags())
                    self.console.advance(self.frames)
                    self._save()
            return {"run_dir": self.run_dir, "checkpoint": self.saved, "step": self.step, "returns": self.returns}
        except _Stopped:
            raise Interrupted(
                self.stop.signum, f"stopped in cycle {self.cycle}; saved {self.saved}; go on with the same command and --resume"
            ) from None
        finally:
            self._close()

    def _run_cycle(self) -> dict[str, float]:
        """One cycle; returns what is logged of it."""
        self._seed(0)
        played = self._play()
        row = played.row(self.config.data.frame_skip)
        batches, validation = self.replay.batches(self.config.run.seed + self.cycle, self.device)
        try:
            if self.cycle == 0:
                for model in (self.model, self.ema):
                    model.initialise_background(batches.mean_frame().to(self.device))
                self.schedules = Schedules(self.optim, max(1.0, batches.steps_per_epoch), self.planned)
            control, data = self.config.control, self.config.data
            ratio = control.train_ratio if self.cycle else control.seed_train_ratio
            steps = max(1, round(ratio * played.frames / (data.batch_size * data.sequence_length)))
            for part, learn in enumerate((self._perceive, self._predict_and_act), 1):
                self._seed(part)
                row |= learn(batches, validation, steps)
            self._seed(0)
            few, spread = self.config.run.validation_batches, validation.one_pass(self.config.run.validation_batches)
            measured = validate(
                self.ema, spread, self.training_step.losses, self.model.encoder.background, self.config.model.codebook_size, few
            )
            row |= {f"validation/{name}": value for name, value in measured.items()}
        finally:
            batches.close()
            validation.close()
        shown = {name: row[name] for name in SHOWN}
        self.console.line(
            f"cycle {self.cycle}, {self.frames * data.frame_skip} environment frames, {self.step} steps, {self.seconds / 60:.1f} min: "
            + ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        )
        return row

    def _play(self) -> Played:
        """The episodes of this cycle, which are in the replay then."""
        control, data = self.config.control, self.config.data
        if self.cycle == 0:
            noise = partial(NoisePolicy, data.policy, self.action_dim)
            played = record(self.replay, noise, self.config.run.seed, control.seed_episodes, self._stop_if_asked)
        elif self.second is None or self.cycle == 1:
            policy = WorldModelPolicy(self.ema, self.behaviour.actor)
            played = record(self.replay, lambda seed: policy, self.config.run.seed, control.cycle_episodes, self._stop_if_asked)
        else:
            if self.cycle == self.resumed_cycle:
                self.second.begin(self.acting, control.cycle_episodes)
            played = self.second.finish(self._stop_if_asked)
        if self.second is not None and self.cycle > 0:
            self.acting = self.saved
            self.second.begin(self.acting, control.cycle_episodes)
        self.frames += played.frames
        self.returns = played.returns
        if len(set(played.returns)) == 1:
            same = f"every episode of cycle {self.cycle} has the return {played.returns[0]:g}"
            self.console.line(f"{same}: without rewards that differ nothing is learnt; record more with --seed-episodes")
        return played

    def _perceive(self, batches, validation, steps: int) -> dict[str, float]:
        """Picture steps, then joint updates."""
        began, pictures = time.perf_counter(), round(PICTURE_SHARE * steps) if self.config.data.stills else 0
        metrics = {}
        for made in range(steps):
            self._stop_if_asked()
            batch = [next(batches)]
            if made < pictures:
                given = self.schedules.picture(self.step)
                update = self.training_step.learn_pictures
            else:
                given = self.schedules.joint(self.joint)
                update, self.joint = self.training_step, self.joint + 1
            on_device = {name: x if isinstance(x, bool) else torch.full((), x, device=self.device) for name, x in given.items()}
            metrics |= update(batch, **on_device).to_dict()
            self.step += 1
        report = self.training_step.faults.read()
        if report.in_a_row >= MAX_SKIPS or (report.terms and self.config.run.on_nan == "stop"):
            raise NonFiniteError(f"{', '.join(report.terms)} in cycle {self.cycle}: not finite; {self._last_good()}")
        seconds = time.perf_counter() - began
        numbers = {name: float(value) for name, value in metrics.items() if name != "finite"}
        frames = steps * self.config.data.batch_size * self.config.data.sequence_length
        return numbers | {"perceive/seconds": seconds, "perceive/frames_per_second": frames / seconds}

    def _predict_and_act(self, batches, validation, steps: int) -> dict[str, float]:
        """Infers all latents, then updates of the latent phase and of actor and critic."""
        began, control = time.perf_counter(), self.config.control
        length = max(CONTEXT + self.optim.latent_phase_frames, BURN_IN + PER_PIECE)
        training, held_out = (LatentReplay(self.ema, part, length) for part in (batches, validation))
        inferred = time.perf_counter()
        phase = LatentPhase(self.ema, training, held_out, self.optim, self.config.run.seed, self.captures, self.all_from, LEAST_LATENT_RATE)
        if self.latent_phase:
            phase.load_state_dict(self.latent_phase)
        for _ in range(round(control.latent_updates * steps)):
            self._stop_if_asked()
            phase.update()
        phase.check()
        measured = phase.measure()
        phase.close()
        self.latent_phase = phase.state_dict()
        self.training_step.ema.adopt(trained_modules(self.ema), trained_modules(self.model))
        predicted = time.perf_counter()
        totals: dict[str, torch.Tensor] = {}
        count = max(1, round(control.policy_updates * steps))
        self._seed(3)
        for _ in range(count):
            self._stop_if_asked()
            pieces = training.draw(max(1, control.imagination_starts // PER_PIECE), BURN_IN + PER_PIECE)
            for name, value in self.behaviour.update(pieces).items():
                totals[name] = totals.get(name, 0.0) + value / count
        report = self.behaviour.faults.read()
        if report.in_a_row >= MAX_SKIPS:
            raise NonFiniteError(f"behaviour: {', '.join(report.terms)} in cycle {self.cycle}: not finite; {self._last_good()}")
        pieces = held_out.draw(MEASURED, BURN_IN + PER_PIECE)
        return {
            "validation/reward_explained": explained_reward(self.ema, pieces),
            **{f"latent_phase/{name}": value for name, value in measured.items()},
            **{f"behaviour/{name}": float(value) for name, value in totals.items()},
            "infer/seconds": inferred - began, "predict/seconds": predicted - inferred, "act/seconds": time.perf_counter() - predicted,
        }  # fmt: skip

    def _seed(self, part: int) -> None:
        """Random numbers of a part of a cycle: the same whether or not the run was stopped before."""
        torch.manual_seed((self.config.run.seed * 1_000_003 + self.cycle) * 4 + part)

    def _stop_if_asked(self) -> None:
        if self.stop.signum is not None:
            raise _Stopped

    def _last_good(self) -> str:
        return f"last good checkpoint: {self.saved}" if self.saved else f"no checkpoint has been saved yet in {self.run_dir}"

    def _save(self) -> None:
        dropped = self.replay.oldest(self.config.control.replay_frames)
        config = dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, data=str(self.replay.folder)))
        state = {
            "epoch": 0.0, "cycle": self.cycle, "joint": self.joint, "frames": self.frames, "seconds": self.seconds,
            "returns": self.returns, "episodes": self.replay.next_number, "logged": self.logger.rows,
            "acting": str(self.acting or ""), "latent_phase": None, "latents": self.latent_phase, "behaviour": self.behaviour.state_dict(),
            "updates_per_epoch": self.schedules.updates_per_epoch,
            "picture_steps": 0, "action_dim": self.action_dim, "config": to_dict(config),
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
            self.seconds, self.returns, self.latent_phase = float(state["seconds"]), list(state["returns"]), state["latents"]
            self.logged, self.resumed_cycle, self.acting = state["logged"], self.cycle, Path(state["acting"])
            if self.second is not None and self.cycle > 1 and not self.acting.is_file():
                raise CheckpointError(
                    f"--resume: {self.acting}, by whose policy the next episodes are played, is missing; add --no-plays-beside"
                )
            self.schedules = Schedules(self.optim, float(state["updates_per_epoch"]), self.planned)

    def _open(self, wanted: int) -> None:
        self.console = Console(wanted, self.frames, on_lost=self.stop.request)
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
            f"online: {self.config.data.domain} {self.config.data.task}, environment frames {self.frames * skip} to {wanted * skip}, "
            f"{facts['parameters'] / 1e6:.1f} M parameters on {facts['device']}, into {self.run_dir}"
        )

    def _close(self) -> None:
        for opened in (self.second, getattr(self, "console", None), getattr(self, "logger", None)):
            if opened is not None:
                opened.close()
        self.lock.release()


def _planned_steps(config: Config, longest: int) -> tuple[int, int]:
    """Updates of the world model that the run will make, about, and those of its first cycle, where no episode ends early."""
    control, data = config.control, config.data
    total, batch = control.environment_frames / data.frame_skip, data.batch_size * data.sequence_length
    seeds = min(total, control.seed_episodes * longest)
    first = control.seed_train_ratio * seeds / batch
    return max(1, round(first + control.train_ratio * (total - seeds) / batch)), round(first)
