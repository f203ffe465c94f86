"""Whatever ends a run from outside, it saves first and leaves with the documented status."""

from __future__ import annotations

import dataclasses
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import command as run_here
from test_latent_phase import stop_after
from test_trainer import config_of, poison, rows

from aime_fast.errors import Interrupted, NonFiniteError
from aime_fast.training import DMCVBTrainer, load_model
from aime_fast.training.interrupts import StopSignals
from aime_fast.training.logging import Console
from aime_fast.training.schedules import CheckpointDue


def command(run_dir: Path, *flags: str) -> list[str]:
    program = [sys.executable, "-u", "-m", "aime_fast.train", "--tier", "debug", "--data", "synthetic"]
    return [*program, "--threads", "1", "--run-dir", str(run_dir), *flags]


def saved_step(run_dir: Path) -> int:
    return load_model(run_dir)[2]["step"]


LONG = ("--steps", "100000", "--validate-every", "0", "--sample-every", "0", "--checkpoint-every", "100000")


def test_sighup_and_its_twin_in_training_save(tmp_path):
    with subprocess.Popen(command(tmp_path, *LONG), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGHUP)
                process.send_signal(signal.SIGHUP)  # from the shell, after that of the terminal
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 129, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    assert saved_step(tmp_path) >= 3


def test_a_pipe_that_nobody_reads_saves(tmp_path):
    with subprocess.Popen(command(tmp_path, *LONG), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE, errors
    assert errors.count("\n") == 1
    assert "the output cannot be written any more" in errors
    assert saved_step(tmp_path) >= 4


def test_a_closed_terminal_saves(tmp_path):
    """The terminal of the process, with its progress bar, goes away: SIGHUP, and EIO for whatever is written after it."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, command(tmp_path, *LONG))
    seen = b""
    while b"step 3/" not in seen:
        seen += os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert saved_step(tmp_path) >= 3


@pytest.mark.parametrize(
    ("flags", "line", "step"),
    [
        (("--steps", "2", "--latent-phase-updates", "400"), "latent phase 20/", 2),
        (("--steps", "2", "--latent-phase-updates", "400"), "step 2: inferring all episodes", 2),
        (("--steps", "2"), "step 2 validation:", 2),
        (("--steps", "2"), "run  ", 2),
    ],
)
def test_sigterm_after_the_joint_updates_loses_none(tmp_path, flags, line, step):
    """In the latent phase, in the inference before it, in the last validation, in the report."""

    class Output(io.StringIO):
        sent = False

        def write(self, text):
            written = super().write(text)
            if not self.sent and f"\n{line}" in f"\n{self.getvalue()}":
                self.sent = True
                signal.raise_signal(signal.SIGTERM)
            return written

    settings = ("--tier", "debug", "--data", "synthetic", "--threads", "1", "--run-dir", str(tmp_path))
    done = run_here("train", *settings, *flags, cwd=tmp_path, stdout=Output())
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert saved_step(tmp_path) == step


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_sigterm_at_the_start_ends_it_quietly(tmp_path, seconds):
    with subprocess.Popen(command(tmp_path, *LONG), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (143, -signal.SIGTERM), errors  # a shell calls both 143
    assert "Traceback" not in errors


def test_a_latent_phase_that_a_signal_stops_goes_on_and_leaves_no_row_twice(tmp_path, monkeypatch):
    config = config_of(tmp_path / "stopped", steps=2)
    optim = dataclasses.replace(config.optim, latent_phase_frames=3, latent_phase_batch_size=4, latent_phase_updates=4)
    config = dataclasses.replace(config, optim=optim)
    trainer = DMCVBTrainer(config)
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted, match="stopped after step 2, update 3 of the latent phase; saved"):
        trainer.train()
    monkeypatch.undo()
    assert len([row for row in rows(tmp_path / "stopped") if "latent_phase/update" in row]) == 3
    assert load_model(tmp_path / "stopped")[2]["latent_phase_updates"] == 3
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    DMCVBTrainer(resumed).train()
    DMCVBTrainer(dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=str(tmp_path / "whole")))).train()
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")

    DMCVBTrainer(resumed).train()  # nothing is left to do: its last validation takes the place of the one before
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_a_twin_is_passed_over_and_a_second_signal_later_ends_at_once(monkeypatch):
    stop = StopSignals()
    ended = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    with stop:
        stop._stop(signal.SIGTERM, None)
        stop._stop(signal.SIGTERM, None)
        stop._stop(signal.SIGHUP, None)
        assert (stop.signum, ended) == (signal.SIGTERM, [])
        stop._since -= 5
        stop._stop(signal.SIGHUP, None)  # a terminal that closes is no wish to lose work
        assert ended == []
        stop._stop(signal.SIGTERM, None)
        assert ended == [signal.SIGTERM]


def test_an_output_that_fails_asks_once_for_a_stop(monkeypatch):
    class Broken:
        def __init__(self, error):
            self.error = error

        def write(self, _):
            raise self.error

        def flush(self):
            pass

        def isatty(self):
            return False

    for error, signum in (
        (BrokenPipeError(32, "pipe"), signal.SIGPIPE),
        (OSError(5, "I/O"), signal.SIGHUP),
        (OSError(28, "full"), signal.SIGHUP),
    ):
        asked = []
        monkeypatch.setattr(sys, "stdout", Broken(error))
        console = Console(10, on_lost=asked.append)
        for _ in range(3):
            console.line("text")
        console.close()
        assert asked == [signum]


# What a stop can lose.


def test_a_checkpoint_is_due_at_the_first_log_line_at_its_steps_and_by_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    due = CheckpointDue(every=100, minutes=10, first=10)
    assert [step for step in range(1, 31) if due(step)] == list(range(10, 31))  # until it is saved
    due.saved()
    assert [step for step in range(31, 101) if due(step)] == [100]
    due.saved()
    now[0] += 599
    assert not due(101)
    now[0] += 1
    assert due(102)
    assert due(103)
    due.saved()
    assert not any(CheckpointDue(every=0, minutes=0, first=0)(step) for step in range(1, 50))


def test_a_run_saves_at_its_first_log_line_and_by_the_clock(tmp_path):
    slow = dict(validate_every=0, sample_every=0, checkpoint_every=1000, keep_checkpoints=9, steps=5, log_every=2)
    DMCVBTrainer(config_of(tmp_path / "first", **slow)).train()
    DMCVBTrainer(config_of(tmp_path / "clock", checkpoint_minutes=1e-9, **slow)).train()

    def steps(name):
        return [int(path.stem.split("_")[1]) for path in sorted((tmp_path / name).glob("checkpoint_*"))]

    assert steps("first") == [2, 5]
    assert steps("clock") == [1, 2, 3, 4, 5]


def test_nothing_is_saved_while_updates_are_skipped(tmp_path):
    trainer = DMCVBTrainer(
        config_of(tmp_path, steps=100, on_nan="skip", checkpoint_every=1, keep_checkpoints=1, validate_every=0, sample_every=0)
    )
    poison(trainer, at_step=4)
    with pytest.raises(NonFiniteError, match=r"20 updates in a row.*last good checkpoint: .*checkpoint_00000003\.pt"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_00000003.pt"]


@pytest.mark.parametrize("part", ["weight of the average", "buffer of the average", "moment of the optimizer"])
def test_what_is_not_finite_is_named_when_it_would_be_saved(tmp_path, part):
    trainer = DMCVBTrainer(config_of(tmp_path, steps=6, checkpoint_every=2))
    save = trainer._save

    def damaged():
        if trainer.step == 4:
            if part == "weight of the average":
                next(trainer.ema.parameters()).data.view(-1)[0] = float("nan")
            elif part == "buffer of the average":
                trainer.ema.get_buffer("perceiver_io.tokenizer.quantizer.codebook").view(-1)[0] = float("inf")
            else:
                values = trainer.training_step.optimizer.state_dict().values()
                next(value for value in values if isinstance(value, torch.Tensor) and value.dim()).view(-1)[0] = float("nan")
        save()

    trainer._save = damaged
    with pytest.raises(NonFiniteError, match=r"(ema|optimizer)\..* at step 4: not finite; .*last good checkpoint: .*00000002\.pt"):
        trainer.train()
    assert saved_step(tmp_path) == 2


def test_a_resumed_run_that_fails_names_the_checkpoint_that_it_came_from(tmp_path):
    DMCVBTrainer(config_of(tmp_path, steps=2)).train()
    trainer = DMCVBTrainer(config_of(tmp_path, steps=6, resume=True))
    poison(trainer, at_step=3)
    with pytest.raises(NonFiniteError, match=r"last good checkpoint: .*checkpoint_00000002\.pt"):
        trainer.train()
