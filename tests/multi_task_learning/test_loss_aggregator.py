"""What each task loss holds, how it is weighed, and that every weight matters where it should."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import make_batch, make_model

from aime_fast.config import preset
from aime_fast.data import make_batches
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.multi_task_learning.loss_aggregator import BESIDE, TASKS, TERMS
from aime_fast.training import TrainingStep
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


@pytest.fixture(scope="module")
def outputs():
    model = make_model().train()
    return dict(model.forward_sequence(*make_batch(model, 2, 5), ema=make_model(seed=1)).items())


def tasks(outputs, beta: float = 1.0, overshoot: float = 1.0, **weights) -> dict[str, torch.Tensor]:
    losses = LossAggregator(**weights).compute_losses(outputs, beta, overshoot=overshoot)[0]
    return {name: losses[name].detach() for name in TASKS}


@pytest.mark.parametrize(
    ("term", "task", "weight"),
    [
        ("gram", "elbo", "lambda_gram"),
        ("kl_attention", "predictive", "lambda_kl_attention"),
        ("overshoot_attention", "predictive", "lambda_kl_attention"),
        ("attention_motion", "predictive", "lambda_attention_motion"),
        ("attention_foreground", "predictive", "lambda_attention_foreground"),
    ],
)
def test_a_term_moves_its_task_alone_by_its_weight_and_is_not_divided_by_the_pixels(outputs, term, task, weight):
    weights = {weight: 0.3, "lambda_overshoot": 1.0}
    before, after = tasks(outputs, **weights), tasks(outputs | {term: outputs[term] + 2.0}, **weights)
    for name in TASKS:
        torch.testing.assert_close(after[name] - before[name], torch.full_like(before[name], 0.6 if name == task else 0.0))


def test_the_kl_of_attention_is_not_under_beta(outputs):
    more = outputs | {"kl_attention": outputs["kl_attention"] + 1.0}
    assert tasks(more, beta=0.0)["elbo"] == tasks(outputs, beta=0.0)["elbo"]
    for beta in (0.0, 1.0):
        assert tasks(more, beta=beta)["predictive"] > tasks(outputs, beta=beta)["predictive"] + 0.05
    imagined = outputs | {"overshoot_attention": outputs["overshoot_attention"] + 1.0}
    assert tasks(imagined, overshoot=0.0)["predictive"] == tasks(outputs, overshoot=0.0)["predictive"]


def test_every_task_has_its_place_among_the_backward_passes():
    assert sorted(BESIDE) == sorted(TASKS)


def test_every_term_matters_to_some_task(outputs):
    off_by_default = dict(lambda_gram=1.0, lambda_attention_foreground=1.0)
    base = tasks(outputs, **off_by_default)
    for term in TERMS:
        changed = tasks(outputs | {term: outputs[term] + 1.0}, **off_by_default)
        assert sum(changed[name] != base[name] for name in TASKS) == 1, term


@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_without_a_weight_for_gram_the_averaged_encoder_is_not_run(weight):
    config = preset("debug")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data="synthetic", prefetch=0),
        loss=dataclasses.replace(config.loss, lambda_gram=weight),
    )
    training, validation = make_batches(config.data, 0)
    step = TrainingStep(DPGMMVariationalRecurrentAutoencoder.from_config(config, 2), config)
    calls, features = [], step.ema.model.encoder.features
    step.ema.model.encoder.features = lambda frames: calls.append(len(frames)) or features(frames)
    metrics = step([next(training)], torch.ones(()), torch.tensor(1e-3), False)
    assert bool(metrics["finite"])
    assert calls == ([10] if weight else [])
    training.close()
    validation.close()
