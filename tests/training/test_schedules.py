"""Schedules and the moving average of the weights."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aime_fast.config import OptimConfig
from aime_fast.training.arena import Arena
from aime_fast.training.ema import EMA
from aime_fast.training.schedules import Every, Start, Warmup, learning_rate


@given(n=st.integers(1, 50), last=st.integers(0, 500))
def test_every_fires_once_in_each_stretch_of_n(n, last):
    assert sum(Every(n)(step) for step in range(last + 1)) == last // n
    assert not any(Every(0)(step) for step in range(last + 1))


def test_start_is_off_then_on():
    assert [Start(2.5)(step) for step in range(5)] == [False, False, False, True, True]


@given(value=st.floats(0.1, 10), steps=st.integers(1, 1000), step=st.integers(0, 2000))
def test_warmup_rises_from_zero_to_its_value_and_stays(value, steps, step):
    warmup = Warmup(value, steps)
    assert warmup(0) == 0
    assert warmup(step) <= warmup(step + 1) <= value
    assert warmup(steps) == warmup(steps + step) == value
    assert Warmup(value, 0)(0) == value


@given(total=st.integers(1, 1000), step=st.integers(0, 2000))
def test_cosine_falls_from_the_rate_to_zero(total, step):
    optim = OptimConfig(schedule="cosine", lr_warmup_steps=0)
    rate = learning_rate(optim, total)
    assert rate(0) == optim.learning_rate
    assert rate(step) >= rate(step + 1) >= 0
    assert rate(total + step) == 0
    assert learning_rate(dataclasses.replace(optim, schedule="constant"), total)(step) == optim.learning_rate


def test_the_learning_rate_rises_over_its_warm_up():
    rate = learning_rate(OptimConfig(learning_rate=1.0, lr_warmup_steps=4), 100)
    assert [rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


@settings(deadline=None, max_examples=20)
@given(decay=st.floats(0.0, 0.999), steps=st.integers(0, 5))
def test_ema_is_the_weighted_mean_of_all_weights_and_copies_buffers(decay, steps):
    model = nn.BatchNorm1d(3)
    ema = EMA(model, decay, [Arena([model.bias]), Arena([model.weight])])
    expected = model.weight.detach().clone()
    for step in range(steps):
        with torch.no_grad():
            model.weight.add_(step + 1.0)
        model.running_mean.fill_(step)
        ema.update(torch.tensor(True))
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
