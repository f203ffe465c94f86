"""Updates of encoder and decoder alone, on single frames: which they take, what they change, what a bad one does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from aime_fast.config import Config, preset
from aime_fast.data.windows import Windows
from aime_fast.errors import ConfigError
from aime_fast.training import DMCVBTrainer, load_model


def learn(step, batch):
    return step.stills(batch["stills"].flatten(0, 1).float() / 127.5 - 1, torch.tensor(1e-3), step.autocast())


def test_single_frames_are_of_all_episodes_and_of_the_batch_number_alone():
    windows = Windows([30, 50, 20], sequence_length=5, batch_size=16, seed=3)
    rows = torch.stack([windows.stills(n) for n in range(20)])
    assert rows.shape == (20, 16, 5)
    assert rows.min() >= 0
    assert rows.max() < 100
    assert len(rows.unique()) > 95  # nearly all of the 100 frames
    assert torch.equal(rows[7], Windows([30, 50, 20], 5, 16, 3).stills(7))
    assert not torch.equal(rows[0], rows[1])


def test_they_are_frames_of_the_training_episodes(step_and_batch):
    _, batch = step_and_batch
    assert batch["stills"].shape == batch["pixels"].shape
    assert batch["stills"].dtype == torch.uint8
    assert not torch.equal(batch["stills"], batch["pixels"])


def test_only_encoder_and_decoder_change(step_and_batch):
    step, batch = step_and_batch
    before = {name: p.clone() for name, p in step.model.named_parameters()}
    scalars = learn(step, batch)
    assert all(value.isfinite() for value in scalars.values())
    assert step.stills.optimizer.updates == 2  # --stills of the preset
    changed = {name.partition(".")[0] for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"encoder", "decoder"}


def test_the_loss_falls(step_and_batch):
    step, batch = step_and_batch
    losses = [learn(step, batch)["loss/recon_stills"] for _ in range(15)]
    assert losses[-1] < losses[0]


def test_a_bad_frame_changes_nothing_and_is_reported(step_and_batch):
    step, batch = step_and_batch
    before = {name: p.clone() for name, p in step.model.named_parameters()}
    frames = torch.full((10, 3, 32, 32), torch.nan)
    scalars = step.stills(frames, torch.tensor(1e-3), step.autocast())
    assert scalars["gradient_norm/stills"].isnan()
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())
    step._learn_stills = lambda *_: scalars
    metrics = step([batch], torch.tensor(1.0), torch.tensor(1e-3), False)
    assert not bool(metrics["finite"])
    assert "stills" in step.faults.read().terms[0]


def picture_run(run_dir: Path, steps: int = 4, **fields) -> Config:
    """A debug run whose first two steps are of encoder and decoder alone."""
    config = preset("debug")
    data = dataclasses.replace(config.data, data="synthetic", stills=fields.pop("stills", 2))
    optim = dataclasses.replace(config.optim, picture_steps=fields.pop("picture_steps", 2))
    run = dataclasses.replace(config.run, run_dir=str(run_dir), steps=steps, device="cpu", validate_every=1, checkpoint_every=1, **fields)
    return dataclasses.replace(config, data=data, optim=optim, run=run)


def rows(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time", "frames_per_second")} for line in lines]


def test_the_first_steps_learn_pictures_alone_and_a_resume_goes_on_in_them(tmp_path):
    DMCVBTrainer(picture_run(tmp_path / "straight")).train()
    training = [row for row in rows(tmp_path / "straight") if "loss/recon_stills" in row]
    assert [row["step"] for row in training if "loss/elbo" not in row] == [1, 2]
    assert [row["step"] for row in training if "loss/elbo" in row] == [3, 4]
    assert training[0]["learning_rate"] == pytest.approx(training[2]["learning_rate"])  # each begins at the foot of its rise
    assert training[2]["beta"] == 0
    assert [row["step"] for row in rows(tmp_path / "straight") if "validation/psnr" in row] == [3, 4]
    before, after = (torch.load(tmp_path / "straight" / f"checkpoint_{n:08d}.pt", weights_only=True)["model"] for n in (2, 3))
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} > {"encoder", "prior", "perceiver_io"}

    DMCVBTrainer(picture_run(tmp_path / "halves", steps=1)).train()
    DMCVBTrainer(picture_run(tmp_path / "halves", resume=True)).train()
    one, other = (load_model(tmp_path / name)[0].state_dict() for name in ("straight", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_more_steps_on_a_resume_do_not_bring_picture_steps_back(tmp_path):
    assert DMCVBTrainer(picture_run(tmp_path / "share", steps=6, picture_steps=None)).picture_steps == 4  # two thirds
    DMCVBTrainer(picture_run(tmp_path / "run", steps=3, picture_steps=None)).train()
    resumed = DMCVBTrainer(picture_run(tmp_path / "run", steps=9, picture_steps=None, resume=True))
    assert resumed.picture_steps == 2
    resumed.lock.release()
    DMCVBTrainer(picture_run(tmp_path / "early", steps=2, picture_steps=4)).train()  # pictures alone
    fewer = DMCVBTrainer(picture_run(tmp_path / "early", steps=4, picture_steps=4, resume=True))
    assert fewer.picture_steps == 4
    fewer.lock.release()


def test_picture_steps_without_single_frames_are_refused_and_by_themselves_left_out(tmp_path):
    with pytest.raises(ConfigError, match=r"--picture-steps 2: .*--stills"):
        DMCVBTrainer(picture_run(tmp_path / "refused", stills=0))
    assert DMCVBTrainer(picture_run(tmp_path / "none", stills=0, picture_steps=None)).picture_steps == 0


def test_a_bad_frame_in_a_picture_step_is_named_and_changes_nothing(step_and_batch):
    step, batch = step_and_batch
    step._observe = lambda pixels: torch.full(pixels.shape, torch.nan)
    before = {name: value.clone() for name, value in step.ema.model.state_dict().items()}
    metrics = step.learn_pictures([batch], torch.tensor(1e-3))
    assert not bool(metrics["finite"])
    assert "loss/recon_stills" in step.faults.read().terms
    assert "recon_stills" in str(step.diagnose(1))
    assert all(torch.equal(value, before[name]) for name, value in step.ema.model.state_dict().items())
