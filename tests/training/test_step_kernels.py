"""The model trains through the Triton kernels as it does through their references."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aime_fast.config import preset
from aime_fast.data import make_batches
from aime_fast.training import TrainingStep
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder
from kernels.backend import select_kernels

NAMES = ("vq_assign", "vq_update", "kumaraswamy_sticks", "rgb_rotate_", "group_norm_silu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(kernels: str, steps: int = 2) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Metrics of each step, and the weights after the last."""
    select_kernels(kernels)
    config = preset("debug")
    # Few frames, loops and parameters: the interpreter takes its time for every tile.
    data = dataclasses.replace(config.data, data="synthetic", augment=False, prefetch=0, sequence_length=3, stills=1)
    model = dataclasses.replace(
        config.model, blocks_per_level=0, slot_iterations=1, overshoot_frames=1, dense_dim=16, predictor_dim=16, tokenizer_channels=(8, 8)
    )
    config = dataclasses.replace(config, data=data, model=model)
    batches, validation = make_batches(config.data, 0, DEVICE)
    torch.manual_seed(0)
    model = DPGMMVariationalRecurrentAutoencoder.from_config(config, batches.action_dim).to(DEVICE)
    step = TrainingStep(model, config)
    half = torch.tensor(0.5, device=DEVICE)
    metrics = [dict(step([next(batches)], half, 1e-3 * half, True).items()) for _ in range(steps)]
    batches.close()
    validation.close()
    return metrics, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.usefixtures("triton_kernels")
def test_two_steps_give_the_losses_of_the_reference(monkeypatch):
    called = set()
    for name in NAMES:
        packet = getattr(torch.ops.aime_fast, name)
        monkeypatch.setattr(torch.ops.aime_fast, name, lambda *a, _packet=packet, _name=name: (called.add(_name), _packet(*a))[1])
    ours, weights = train("triton")
    assert called == set(NAMES)
    theirs, expected = train("reference")
    for step, (kernel, reference) in enumerate(zip(ours, theirs)):
        assert kernel.keys() == reference.keys()
        for name, value in reference.items():
            torch.testing.assert_close(kernel[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}")
    # Adam turns a gradient of rounding noise into a whole step of either sign, so a few weights may differ by two steps.
    assert ((weights - expected).abs() > 1e-5).float().mean() < 1e-3
