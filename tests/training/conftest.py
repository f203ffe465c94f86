"""What tests of single updates share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aime_fast.config import preset
from aime_fast.data import make_batches
from aime_fast.training import TrainingStep
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


@pytest.fixture
def step_and_batch(request):
    """A debug step and a batch of synthetic frames; of another precision where a test is parametrised with it."""
    config = preset("debug")
    data = dataclasses.replace(config.data, data="synthetic", augment=False, prefetch=0)
    run = dataclasses.replace(config.run, precision=getattr(request, "param", config.run.precision))
    config = dataclasses.replace(config, data=data, run=run)
    training, validation = make_batches(config.data, 0, "cpu")
    torch.manual_seed(0)
    model = DPGMMVariationalRecurrentAutoencoder.from_config(config, training.action_dim)
    yield TrainingStep(model, config), next(training)
    training.close()
    validation.close()
