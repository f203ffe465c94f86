"""Whole runs on synthetic data: resuming, stopping, non-finite values, loggers, and the command as a user types it."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aime_fast import train
from aime_fast.cli import run_command
from aime_fast.config import Config, preset
from aime_fast.errors import ConfigError, NonFiniteError
from aime_fast.training import DMCVBTrainer, load_model
from aime_fast.training.settings import training_length


def config_of(run_dir: Path, **run) -> Config:
    config = preset("debug")
    data = dataclasses.replace(config.data, data="synthetic")
    return dataclasses.replace(config, data=data, run=dataclasses.replace(config.run, run_dir=str(run_dir), **run))


def rows(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock says."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("time", "frames_per_second")} for line in lines]


def test_resume_equals_no_interruption(tmp_path):
    straight = DMCVBTrainer(config_of(tmp_path / "straight", steps=6)).train()
    DMCVBTrainer(config_of(tmp_path / "halves", steps=3, validate_every=0)).train()
    halves = config_of(tmp_path / "halves", steps=6, resume=True)
    DMCVBTrainer(halves).train()

    def training(name):
        return [row for row in rows(tmp_path / name) if "loss/elbo" in row]

    assert [row["step"] for row in training("straight")] == [1, 2, 3, 4, 5, 6]
    assert training("halves") == training("straight")
    first, second = (load_model(tmp_path / name)[0].state_dict() for name in ("straight", "halves"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    # What a finished run leaves behind.
    run_dir = straight["run_dir"]
    assert [p.name for p in sorted(run_dir.glob("checkpoint_*"))] == [f"checkpoint_{n:08d}.pt" for n in (2, 4, 6)]
    assert straight["checkpoint"] == run_dir / "checkpoint_00000006.pt"
    assert (run_dir / "config.yaml").is_file()
    facts = json.loads((run_dir / "run.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"] == "cpu"
    assert len(json.loads((tmp_path / "halves" / "run.json").read_text())["resumed"]) == 1
    assert (run_dir / "prediction.mp4").read_bytes()[4:8] == b"ftyp"
    picture = run_dir / "samples" / "step_00000002.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert picture.stat().st_size < 300_000
    assert straight["validation"]["psnr"] > 0

    # A resumed run that came from an older checkpoint writes its lines again, once.
    (tmp_path / "halves" / "checkpoint_00000006.pt").unlink()
    DMCVBTrainer(halves).train()
    assert training("halves") == training("straight")


def poison(trainer: DMCVBTrainer, at_step: int) -> None:
    """Put a nan into a weight just before update `at_step`."""
    inner = trainer.training_step

    def bad(*args, **kwargs):
        if trainer.step + 1 == at_step:
            with torch.no_grad():
                trainer.model.encoder.state_dict(keep_vars=True).popitem()[1].view(-1)[0] = float("nan")
        return inner(*args, **kwargs)

    trainer.training_step = type("Poisoned", (), {"__call__": staticmethod(bad), "__getattr__": lambda _, name: getattr(inner, name)})()


def test_nan_stops_with_step_term_and_checkpoint(tmp_path):
    trainer = DMCVBTrainer(config_of(tmp_path, steps=6))
    poison(trainer, at_step=4)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith("output 'posterior_")
    assert "at step 4: " in message
    assert "parameter encoder." in message
    assert str(tmp_path / "checkpoint_00000002.pt") in message
    assert rows(tmp_path)[-1]["step"] == 3


def test_on_nan_skip_passes_over_a_bad_batch_and_gives_up_on_bad_weights(tmp_path):
    trainer = DMCVBTrainer(config_of(tmp_path / "batch", steps=4, on_nan="skip"))
    good = iter(trainer.batches)

    class OneBad:
        taken = 0

        def __next__(self):
            batch, self.taken = next(good), self.taken + 1
            if self.taken == 2:
                batch["action"] = torch.full_like(batch["action"], float("inf"))
            return batch

        def __getattr__(self, name):
            return getattr(good, name)

    trainer.batches = OneBad()
    trainer.train()
    training = [row for row in rows(tmp_path / "batch") if "loss/elbo" in row]
    assert [row["skipped_updates"] for row in training] == [0, 1, 1, 1]
    assert [row["loss/elbo"] is None for row in training] == [False, True, False, False]

    seldom = {name: 0 for name in ("validate_every", "sample_every", "checkpoint_every")}
    trainer = DMCVBTrainer(config_of(tmp_path / "weights", steps=100, on_nan="skip", **seldom))
    poison(trainer, at_step=2)
    with pytest.raises(NonFiniteError, match="20 updates in a row"):
        trainer.train()
    assert trainer.step == 21


def test_tensorboard_and_wandb_write_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    DMCVBTrainer(config_of(tmp_path, steps=2, logger=("tensorboard", "wandb"))).train()
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert (tmp_path / "metrics.jsonl").stat().st_size


def test_sigterm_saves_and_a_resume_goes_on(tmp_path):
    command = [sys.executable, "-u", "-m", "aime_fast.train", "--tier", "debug", "--data", "synthetic", "--run-dir", str(tmp_path)]
    with subprocess.Popen(
        [*command, "--steps", "100000", "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    saved = max(tmp_path.glob("checkpoint_*.pt"))
    assert saved.name in errors
    step = int(saved.stem.split("_")[1])
    assert step >= 3
    result = DMCVBTrainer(config_of(tmp_path, steps=step + 1, resume=True, threads=1)).train()
    assert result["step"] == step + 1
    steps = [row["step"] for row in rows(tmp_path) if "loss/elbo" in row]
    assert steps == list(range(1, step + 2))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tier", "9"], "--tier 9"),
        (["--steps", "3", "--epochs", "2"], "--steps 3 and --epochs 2"),
        (["--steps", "0"], "--steps 0"),
        (["--data", "absent.h5"], "absent.h5"),
        (["--device", "tpu"], "--device tpu"),
        (["--threads", "0"], "--threads 0"),
        (["--latent-dim", "many"], "latent-dim"),
        pytest.param(
            ["--device", "cuda"], "--device cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
        ),
    ],
)
def test_wrong_flags_are_one_message_and_status_2(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", "--tier", "debug", "--data", "synthetic", "--run-dir", "run", *flags])
    with pytest.raises(SystemExit) as leaving:
        run_command(train.main)
    assert leaving.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_dir_in_use_and_other_settings_are_refused(tmp_path):
    DMCVBTrainer(config_of(tmp_path, steps=1)).train()
    with pytest.raises(ConfigError, match="--resume"):
        DMCVBTrainer(config_of(tmp_path, steps=2))
    changed = config_of(tmp_path, steps=2, resume=True)
    changed = dataclasses.replace(changed, optim=dataclasses.replace(changed.optim, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"optim\.learning_rate was 0\.0002, is now 1\.0"):
        DMCVBTrainer(changed)


def test_steps_on_the_command_line_override_the_epochs_of_the_preset():
    tier = preset(1)
    assert training_length(tier) == {"steps": None, "epochs": 50}
    assert training_length(dataclasses.replace(tier, run=dataclasses.replace(tier.run, steps=7))) == {"steps": 7, "epochs": None}
    debug = preset("debug")
    assert training_length(dataclasses.replace(debug, run=dataclasses.replace(debug.run, epochs=0.5))) == {"steps": None, "epochs": 0.5}
