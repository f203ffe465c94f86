"""Updates of encoder and decoder alone, on single frames: which they take, what they change, what a bad one does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aime_fast.config import preset
from aime_fast.data import make_batches
from aime_fast.data.windows import Windows
from aime_fast.training import TrainingStep
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


@pytest.fixture
def step_and_batch():
    config = preset("debug")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data="synthetic", augment=False, prefetch=0))
    training, validation = make_batches(config.data, 0, "cpu")
    torch.manual_seed(0)
    model = DPGMMVariationalRecurrentAutoencoder.from_config(config, training.action_dim)
    yield TrainingStep(model, config), next(training)
    training.close()
    validation.close()


def learn(step, batch):
    return step.stills(batch["stills"].flatten(0, 1).float() / 127.5 - 1, torch.tensor(1.0), torch.tensor(1e-3), step.autocast())


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
    scalars = step.stills(frames, torch.tensor(1.0), torch.tensor(1e-3), step.autocast())
    assert scalars["gradient_norm/stills"].isnan()
    assert all(torch.equal(p, before[name]) for name, p in step.model.named_parameters())
    step._learn_stills = lambda *_: scalars
    metrics = step([batch], torch.tensor(1.0), torch.tensor(1e-3), False)
    assert not bool(metrics["finite"])
    assert "stills" in step.faults.read().terms[0]
