"""DMCVBTrainer: data, model, step, schedules, logging and checkpoints joined into a run."""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import time
from pathlib import Path

import torch
from tensordict import TensorDict

from aime_fast.bounds import check
from aime_fast.config import LATENT_UPDATES, Config, to_dict
from aime_fast.data import make_batches
from aime_fast.data.split import saved_split
from aime_fast.errors import CheckpointError, Interrupted, NonFiniteError
from aime_fast.evaluation.collapse import Watch, replay
from aime_fast.evaluation.pictures import write_prediction, write_samples
from aime_fast.evaluation.validation import validate
from aime_fast.runtime import ranks
from aime_fast.runtime.compile_cache import save_compiled
from aime_fast.runtime.lock import FolderLock
from aime_fast.runtime.machine import WAYS
from aime_fast.training import checkpoint
from aime_fast.training.faults import MAX_SKIPS
from aime_fast.training.interrupts import StopSignals
from aime_fast.training.latent_phase import check_lengths, train_latent_phase, trained_modules
from aime_fast.training.logging import Console, Logger, Silence, launched_by, write_run_files
from aime_fast.training.metrics import ResumePoint, read_rows
from aime_fast.training.schedules import CheckpointDue, Every, Schedules
from aime_fast.training.settings import (
    check_pictures,
    check_shares,
    collected_data,
    default_run_dir,
    picture_steps,
    prepare_machine,
    run_facts,
    training_length,
    without_unrecorded_rewards,
)
from aime_fast.training.step import TrainingStep, on_device
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


class DMCVBTrainer:
    """Trains AIME on a task.

    Wrong settings are reported here, by the constructor, the cheap checks first. Without `data.data` the data are
    collected now, to `data/`, unless a file of the same settings is there already. The run's folder is locked from here to the end of
    `train`. `run.resume` goes on from the newest whole checkpoint, or starts anew where there is none.

    Args:
        config: the whole run. `run.steps` or `run.epochs` says how long; where both are set, the one that differs from the tier's
            preset counts.

    Attributes:
        config: with `data.data` and `run.run_dir` filled in.
        model, ema: weights in training and their moving average.
        step, total_steps: updates done, updates to do.
        run_dir: where everything is written.

    Raises:
        ConfigError: settings that contradict each other or the machine; a folder that another run uses, or that holds a run already.
        DataError: unusable data.
        CheckpointError: every checkpoint is damaged, or the newest is of other settings or another version, or cannot be read.
        OSError: the folder cannot be written to.

    Example:
        >>> DMCVBTrainer(preset("debug")).train()
    """

    def __init__(self, config: Config):
        run = config.run
        check(config)
        length = training_length(config)
        self.device, self.compile = prepare_machine(run)
        check_pictures(config)
        check_shares(config, ranks.of_run().size)
        self.run_dir = Path(run.run_dir or default_run_dir(config))
        self.lock = FolderLock(self.run_dir) if ranks.leads() else None
        try:
            self._prepare(config, length)
        except BaseException:
            if self.lock is not None:
                self.lock.release(discard=True)
            raise

    def _prepare(self, config: Config, length: dict[str, float | None]) -> None:
        """Data, model and state, of the start or of the checkpoint to go on from."""
        run = config.run
        self.saved_step: int | None = None  # of the newest checkpoint, `saved`
        report = print if ranks.leads() else lambda *_: None
        if ranks.restarted() and launched_by(self.run_dir) == ranks.launch():
            run = dataclasses.replace(run, resume=True)
            config = dataclasses.replace(config, run=run)
        with ranks.leader_first():
            self.saved, resumed = checkpoint.find_resume(self.run_dir, run.resume, report)
            data = dataclasses.replace(config.data, data=config.data.data or str(collected_data(config)))
        config = dataclasses.replace(config, data=data, run=dataclasses.replace(run, run_dir=str(self.run_dir)))
        self.config = config = without_unrecorded_rewards(config, report)
        if resumed is not None:
            with checkpoint.fitting(self.saved):
                checkpoint.check_same_config(resumed["config"], config)

        split = None if resumed is None else saved_split(resumed)
        self.batches, self.validation = make_batches(config.data, run.seed, self.device, split, share=ranks.of_run())
        self.updates_per_epoch = max(1.0, self.batches.steps_per_epoch / config.optim.accumulate)
        self.total_steps = length["steps"] or max(1, round(length["epochs"] * self.updates_per_epoch))
        with checkpoint.fitting(self.saved):
            self.picture_steps = picture_steps(config, self.total_steps, resumed)
        joint_steps, phase = max(0, self.total_steps - self.picture_steps), config.optim.latent_phase_updates
        self.optim = dataclasses.replace(config.optim, latent_phase_updates=LATENT_UPDATES * joint_steps if phase is None else phase)
        check_lengths(self.optim, self.batches, self.validation)
        torch.manual_seed(run.seed)
        self.model = DPGMMVariationalRecurrentAutoencoder.from_config(config, self.batches.action_dim).to(self.device)
        self.mean_frame = self.batches.mean_frame().to(self.device)
        self.model.initialise_background(self.mean_frame)
        self.training_step = TrainingStep(self.model, config, self.compile)
        self.ema = self.training_step.ema.model
        if self.device.type == "cuda":  # on a CPU a compiled roll-out gains nothing
            self.ema.compile_imagination(self.compile)

        self.schedules = Schedules(config.optim, self.updates_per_epoch, joint_steps)
        # Whether an update was made is known on the device. On a CPU it is read each time, at no cost; on CUDA with the metrics.
        self.should_check_faults = Every(run.log_every if self.device.type == "cuda" else 1)
        self.step, self.seconds = 0, 0.0
        self.latent_phase: dict | None = None  # settings of the last latent phase, its progress, the weights that it changes, before it
        self.skipped, self.is_skipping = 0, False  # updates not made; whether the last one was not
        self.checkpoint_due = CheckpointDue(run.checkpoint_every, run.checkpoint_minutes, first=max(1, run.log_every))
        self.stop, self.stopping = StopSignals(), False  # `stopping`: a signal has come to any process of the run, as all have agreed
        self.console = self.logger = None
        self.logged: int | None = None  # rows of metrics.jsonl when the checkpoint was saved
        if resumed is not None:
            self._load(resumed)
        if ranks.of_run().size > 1:
            self._check_alike()

    def _check_alike(self) -> None:
        """Raises CheckpointError where the processes of the run do not start from the same data and weights."""
        start = repr((self.step, self.batches.split, [p.double().sum().item() for p in self.model.parameters()]))
        if not ranks.alike(int.from_bytes(hashlib.sha256(start.encode()).digest()[:7])):
            raise CheckpointError(
                f"{self.run_dir}, {self.config.data.data}: the processes of this run do not start alike; on all machines these must be the "
                "same folder and the same data"
            )

    def train(self) -> dict:
        """Run until `total_steps`, then the latent phase if one is set, then validate and write the prediction video.

        Returns:
            `run_dir`, `checkpoint`, `video` (paths), `step`, and `validation` (the last table).

        Raises:
            NonFiniteError: a loss or gradient was not finite; the weights never took that update. With CUDA it may be noticed up to
                `log_every` updates later, which were made.
            Interrupted: Ctrl-C, SIGTERM, SIGHUP or an output that nobody reads any more, after a checkpoint was saved.
            OSError: the disk is full or the like; earlier checkpoints are there.
        """
        run, stop = self.config.run, self.stop
        should_log, should_validate, should_sample = map(Every, (run.log_every, run.validate_every, run.sample_every))
        try:
            with stop:
                self._open()
                if self.step < self.total_steps:
                    self._undo_latent_phase()
                while self.step < self.total_steps and not self._agree_to_stop():
                    metrics = self._update()
                    last, saves = self.step == self.total_steps, self._save_is_due(self.step)
                    reads = any(should(self.step) for should in (self.should_check_faults, should_validate, should_sample))
                    if last or saves or reads:
                        self._check_faults()
                    if last or should_log(self.step):
                        self._log(metrics)
                    if should_validate(self.step) and self.picture_steps < self.step < self.total_steps:
                        self._validate()
                    if should_sample(self.step) and self.picture_steps < self.step:
                        self._sample()
                    if saves and not self.is_skipping:
                        self._save()
                if self.stopping:
                    self._check_faults()
                if self.saved_step != self.step and not (self.stopping and self.is_skipping and self.saved):
                    self._save()
                if run.compile_cache is not None and ranks.leads():
                    save_compiled(run.compile_cache)
                if not self.stopping:
                    self._train_latent_phase()
            if self._agree_to_stop():
                why = " since the output cannot be written any more" if self.console.lost else ""
                raise Interrupted(
                    stop.signum, f"stopped after {self._place()}{why}; saved {self.saved}; go on with the same command and --resume"
                )
            return self._finish()
        finally:
            self._close()

    def _agree_to_stop(self) -> bool:
        """Whether a stop signal has come to any process of the run; all are to ask as often."""
        (self.stopping,) = ranks.anywhere(self.stop.signum is not None)
        if self.stopping:
            self.stop.request(signal.SIGTERM)  # where the signal came to another process
        return self.stopping

    def _save_is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after so many updates, by the leader's clock."""
        return ranks.anywhere(ranks.leads() and self.checkpoint_due(step))[0]

    def _update(self) -> TensorDict:
        """One update of the weights. With CUDA it returns before the device is done."""
        began = time.perf_counter()
        batches = [next(self.batches) for _ in range(self.config.optim.accumulate)]
        made = self.step - self.picture_steps  # joint updates
        given = self.schedules.picture(self.step) if made < 0 else self.schedules.joint(made)
        update = self.training_step.learn_pictures if made < 0 else self.training_step
        metrics = update(batches, **on_device(given, self.device))
        self.seconds += time.perf_counter() - began
        self.step += 1
        self.frames += sum(batch["pixels"].shape[:2].numel() for batch in batches) * ranks.of_run().size
        self.console.advance(self.step)
        return metrics

    def _check_faults(self) -> None:
        """Read whether updates were skipped since the last check; stop, or report them. The only wait for the device in the loop."""
        began = time.perf_counter()
        report = self.training_step.faults.read()
        self.seconds += time.perf_counter() - began
        self.is_skipping = report.in_a_row > 0
        if not report.terms:
            return
        step = self.step - report.ago
        if report.ago == 0:
            error = self.training_step.diagnose(step)
        else:
            error = NonFiniteError(
                f"{', '.join(report.terms)} at step {step}: not finite (seen at step {self.step}; --log-every 1 --compile off also tells "
                "which tensor and element)"
            )
        last = checkpoint.last_good(self.saved, self.run_dir)
        if self.config.run.on_nan == "stop":
            raise NonFiniteError(
                f"{error}; the update was not made; {last}. Go on from there with --resume, adding --on-nan skip to pass over "
                "such updates; if it comes back, start again with a lower --learning-rate or with --precision fp32"
            )
        self.skipped = report.skipped
        self.console.line(f"skipped the update: {error}")
        if report.in_a_row >= MAX_SKIPS:
            raise NonFiniteError(f"{error}; {report.in_a_row} updates in a row were skipped, the run will not recover; {last}")

    def _log(self, metrics: TensorDict) -> None:
        began = time.perf_counter()
        values = metrics.exclude("finite").to_dict()
        numbers = torch.stack([value.float() for value in values.values()]).tolist()  # waits for the device
        self.seconds += time.perf_counter() - began
        row = {**self._progress(), **dict(zip(values, numbers)), "skipped_updates": self.skipped}
        self.watch.look(self.step, row)
        self.logger.log(self.step, row)
        self.frames, self.frames_since = 0, self.seconds
        terms = ("elbo", "perceiver", "predictive", "adversarial", "recon_stills", "kl_stills")
        shown = ", ".join(f"{name} {row['loss/' + name]:.4g}" for name in terms if f"loss/{name}" in row)
        self.console.line(f"step {self.step}/{self.total_steps}, {row['frames_per_second']:.0f} frames/s: {shown}")

    def _progress(self) -> dict[str, float]:
        since = max(self.seconds - self.frames_since, 1e-9)
        speed = {"frames_per_second": self.frames / since} if self.frames else {}
        return {"epoch": self.step / self.updates_per_epoch, "time": self.seconds, **speed}

    def _validate(self) -> dict[str, float]:
        """Measure the averaged weights. Training's random numbers are unaffected."""
        config = self.config
        with torch.random.fork_rng(self._cuda()), self.training_step.autocast():
            spread = self.validation.one_pass(config.run.validation_batches)
            measured = validate(
                self.ema, spread, self.training_step.losses, self.mean_frame, config.model.codebook_size, config.run.validation_batches
            )
        progress = {name: value for name, value in self._progress().items() if name != "frames_per_second"}
        row = progress | {f"validation/{name}": value for name, value in measured.items()}
        findings = self.watch.look(self.step, row)
        self.logger.log(self.step, row | self.watch.flags())
        self.console.line(
            f"step {self.step} validation: PSNR {measured['psnr']:.2f} dB (mean frame {measured['psnr_mean_frame']:.2f}), "
            f"codes in use {measured['code_usage']:.0%}, effective components {measured['effective_components']:.2f}"
        )
        for finding in findings:
            self.console.line(str(finding))
        return measured

    def _sample(self) -> None:
        if not ranks.leads():
            return
        with torch.random.fork_rng(self._cuda()), self.training_step.autocast():
            pictures = write_samples(self.ema, self.validation.episode(0), self.run_dir / "samples", self.step)
        for name, path in pictures.items():
            self.logger.picture(self.step, name, path)

    def _wanted_latent_phase(self) -> dict[str, float]:
        """What identifies a latent phase: the step that it follows, and its settings."""
        optim = dataclasses.asdict(self.optim)
        return {"step": self.step, **{name: value for name, value in optim.items() if name.startswith("latent_phase_")}}

    def _train_latent_phase(self) -> None:
        """Runs what is left of the latent phase on the averaged weights. One of other settings is undone first, and so is one given up."""
        optim, began, wanted = self.optim, time.perf_counter(), self._wanted_latent_phase()
        if self.latent_phase is not None and self.latent_phase["made"] != wanted:
            if optim.latent_phase_updates:
                self._undo_latent_phase()
            elif self.latent_phase["progress"] is not None:
                self._undo_latent_phase()
                self._save()
        if not optim.latent_phase_updates:
            return
        if self.latent_phase is None:
            before = {name: value.clone() for name, value in trained_modules(self.ema).state_dict().items()}
            self.latent_phase = {"made": wanted, "before": before, "progress": {}}
        if (progress := self.latent_phase["progress"]) is None:
            return
        made = progress.get("update", 0)
        self.console.line(
            f"step {self.step}: inferring all episodes, then updates {made + 1} to {optim.latent_phase_updates} of recurrence and "
            "priors alone"
        )

        def report(made: int, measured: dict[str, float], best: int) -> None:
            seconds = self.seconds + time.perf_counter() - began
            self.console.line(
                f"latent phase {made}/{optim.latent_phase_updates}, {seconds:.0f} s, held out: latent one frame ahead "
                f"{measured['one_step']:.2f} nats, rolled out {measured['rolled_out']:.2f}"
                + (f"; kept are the weights after update {best}" if made == optim.latent_phase_updates and best else "")
            )
            row = {f"latent_phase/{name}": value for name, value in measured.items()}
            self.logger.log(self.step, {"time": seconds, "latent_phase/update": made, **row})

        def save() -> None:
            nonlocal began
            self.seconds, began = self.seconds + time.perf_counter() - began, time.perf_counter()
            self._save()

        train_latent_phase(
            self.ema, self.batches, self.validation, optim, self.config.run.seed, self.latent_phase, report, self._save_is_due, save,
            self._agree_to_stop, WAYS[self.compile].captured, self.config.loss.lambda_outcome,
        )  # fmt: skip

    def _place(self) -> str:
        """How far the run is, in words."""
        progress = (self.latent_phase or {}).get("progress")
        return f"step {self.step}" + (f", update {progress['update']} of the latent phase" if progress else "")

    def _undo_latent_phase(self) -> None:
        """Restores the averaged weights from before the last latent phase, for joint updates or another phase to go on from."""
        if self.latent_phase is not None:
            trained_modules(self.ema).load_state_dict(self.latent_phase["before"])
            self.latent_phase = None

    def _finish(self) -> dict:
        measured = self._validate()
        video = self.run_dir / "prediction.mp4"
        if ranks.leads():
            episodes = (self.validation.episode(i) for i in range(min(4, len(self.validation.episodes))))
            with torch.random.fork_rng(self._cuda()), self.training_step.autocast():
                write_prediction(self.ema, episodes, video, self.device)
        return {"run_dir": self.run_dir, "checkpoint": self.saved, "video": video, "step": self.step, "validation": measured}

    def _save(self) -> None:
        """Raises NonFiniteError, and saves nothing, where weights, averages or moments are not finite."""
        state = {
            "epoch": self.step / self.updates_per_epoch,
            "logged": self.logger.rows,
            "seconds": self.seconds,
            "latent_phase": self.latent_phase,
            "picture_steps": self.picture_steps,
            "action_dim": self.batches.action_dim,
            "config": to_dict(self.config),
            "batches": self.batches.state_dict(),
            "split": {part: list(episodes) for part, episodes in self.batches.split._asdict().items()},
            "rng": checkpoint.rng_state(self.device),
            **self.training_step.state_dict(),
        }
        try:
            checkpoint.check_finite(state, self.step)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {checkpoint.last_good(self.saved, self.run_dir)}") from None
        # While updates are skipped the weights may be bad, though finite: every earlier checkpoint stays.
        keep = self.config.run.keep_checkpoints if not self.is_skipping else self.step + 1
        if ranks.leads():
            checkpoint.save_checkpoint(self.run_dir, self.step, state, keep)
        ranks.wait()
        self.saved, self.saved_step = checkpoint.checkpoint_path(self.run_dir, self.step), self.step
        self.checkpoint_due.saved()

    def _load(self, state: dict) -> None:
        if state.get("action_dim") != self.batches.action_dim:
            raise CheckpointError(
                f"--resume: the checkpoint is for {state.get('action_dim')} actions, {self.config.data.data} has {self.batches.action_dim}"
            )
        with checkpoint.fitting(self.saved):
            self.training_step.load_state_dict(state)
            self.batches.load_state_dict(state["batches"])
            self.skipped = int(state["faults"]["skipped"])
            self.step, self.seconds = int(state["step"]), float(state["seconds"])
            self.latent_phase = state["latent_phase"]
            self.logged = state.get("logged")
            checkpoint.set_rng_state(state["rng"], self.device)
        self.saved_step = self.step
        self.checkpoint_due.saved()

    def _open(self) -> None:
        self.watch = Watch(self.config.model.latent_dim, self.config.model.max_components)
        self.frames, self.frames_since = 0, self.seconds
        if not ranks.leads():
            self.console = self.logger = Silence()
            return
        (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
        facts = {
            "compile": self.compile,
            "replay": "device" if self.batches.resident else "host",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "from_step": self.step,
            "processes": ranks.of_run().size,
            "launch": ranks.launch(),
            "picture_steps": self.picture_steps,
            **run_facts(self.config, self.device),
        }
        self.console = Console(self.total_steps, self.step, on_lost=self.stop.request)
        write_run_files(self.run_dir, self.config, facts, self.saved is not None, self.console.line)
        point = ResumePoint(self.step, self.logged, finished=self.step >= self.total_steps)
        self.logger = Logger(self.run_dir, self.config, point, self.console.line)
        replay(self.watch, read_rows(self.run_dir))
        self.console.line(
            f"training {facts['parameters'] / 1e6:.1f} M parameters on {facts['device']}"
            + (f" and in {facts['processes'] - 1} more processes" if facts["processes"] > 1 else "")
            + f", steps {self.step} to "
            f"{self.total_steps} ({self.updates_per_epoch:g} an epoch), into {self.run_dir}"
            + (f"; to step {self.picture_steps} encoder, decoder and perceiver alone" if self.step < self.picture_steps else "")
        )
        if self.picture_steps >= self.total_steps:
            self.console.line("no step is left in which prior, recurrence and attention learn: give more --steps")

    def _close(self) -> None:
        for opened in (self.console, self.logger, self.batches, self.validation):
            if opened is not None:
                opened.close()
        if self.lock is not None:
            self.lock.release()

    def _cuda(self) -> list[int]:
        return [self.device.index or 0] if self.device.type == "cuda" else []
