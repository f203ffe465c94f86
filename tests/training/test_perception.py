"""Updates of the perceiver alone: what they change, what a bad one does, that a resume goes on in them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aime_fast.config import preset
from aime_fast.training import DMCVBTrainer, load_model


def test_only_the_perceiver_changes_and_its_loss_falls(step_and_batch):
    step, batch = step_and_batch
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    learnt = [step._learn_perception(batch, torch.tensor(1e-3)) for _ in range(12)]
    changed = {name for name, value in step.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"perceiver_io"}
    assert {
        "perceiver_io.mean_code",
        "perceiver_io.tokenizer.quantizer.codebook",
        "perceiver_io.recall.weight",
        "perceiver_io.dense.weight",
    } <= changed
    assert learnt[-1]["loss/perceiver"] < learnt[0]["loss/perceiver"]
    assert step.perception.optimizer.updates == 12


def test_a_bad_sequence_changes_nothing_and_is_named(step_and_batch):
    step, batch = step_and_batch
    step._learn_perception(batch, torch.tensor(1e-3))
    before = {name: value.clone() for name, value in step.model.perceiver_io.state_dict().items()}
    batch["action"] = batch["action"].clone()
    batch["action"][0, 0] = torch.nan
    scalars = step._learn_perception(batch, torch.tensor(1e-3))
    assert scalars["gradient_norm/perception"].isnan()
    assert all(torch.equal(value, before[name]) for name, value in step.model.perceiver_io.state_dict().items())
    assert not bool(step.learn_pictures([batch], torch.tensor(1e-3))["finite"])
    assert "loss/next_token" in step.faults.read().terms


def test_a_bad_gradient_of_finite_terms_is_named(step_and_batch):
    step, batch = step_and_batch
    step.model.perceiver_io.dense.weight.register_hook(lambda gradient: gradient * torch.nan)
    assert not bool(step.learn_pictures([batch], torch.tensor(1e-3))["finite"])
    assert "gradient of perception" in str(step.diagnose(1))


@pytest.mark.parametrize("step_and_batch", ["bf16"], indirect=True)
def test_both_kinds_of_update_run_in_bf16(step_and_batch):
    step, batch = step_and_batch
    assert bool(step.learn_pictures([batch], torch.tensor(1e-3))["finite"])
    assert bool(step([batch], torch.tensor(1.0), torch.tensor(1e-3), True)["finite"])


def test_every_other_picture_step_makes_one_and_a_resume_goes_on(tmp_path):
    def run(run_dir, steps=5, **fields):
        config = preset("debug")
        optim = dataclasses.replace(config.optim, picture_steps=4)
        data = dataclasses.replace(config.data, data="synthetic", stills=2)
        fields = dataclasses.asdict(config.run) | dict(run_dir=str(run_dir), steps=steps, device="cpu", checkpoint_every=1) | fields
        trainer = DMCVBTrainer(dataclasses.replace(config, data=data, optim=optim, run=type(config.run)(**fields)))
        trainer.train()
        return trainer.training_step.perception.optimizer.updates

    assert run(tmp_path / "straight") == 2
    assert run(tmp_path / "halves", steps=3) == 1
    assert run(tmp_path / "halves", resume=True) == 2
    one, other = (load_model(tmp_path / name)[0].state_dict() for name in ("straight", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)
