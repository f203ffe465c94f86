"""Eager, compiled and captured are the same update, traced once and without breaks, and none of them waits for the device."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from aime_fast.config import Config, preset
from aime_fast.data import make_batches
from aime_fast.runtime import cuda_graph
from aime_fast.runtime.machine import WAYS, Way
from aime_fast.training import TrainingStep
from aime_fast.training.execution import Execution, Kind
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 5


def config_of(accumulate: int = 1) -> Config:
    config = preset("debug")  # with every loop as short as shows a loop: each round is traced by itself
    data = dataclasses.replace(config.data, data="synthetic", prefetch=0, sequence_length=3)
    model = dataclasses.replace(config.model, overshoot_frames=2, slot_iterations=2, blocks_per_level=0, discriminator_channels=(8,))
    return dataclasses.replace(config, data=data, model=model, optim=dataclasses.replace(config.optim, accumulate=accumulate))


@pytest.fixture(scope="module")
def batches():
    train, validation = make_batches(config_of().data, 0, DEVICE)
    yield [next(train) for _ in range(STEPS)]
    train.close()
    validation.close()


def make_step(compile: str = "off", accumulate: int = 1) -> TrainingStep:
    torch.manual_seed(0)
    config = config_of(accumulate)
    return TrainingStep(DPGMMVariationalRecurrentAutoencoder.from_config(config, 2).to(DEVICE), config, compile)


def update(step: TrainingStep, group, i: int, train_discriminator: bool = True) -> dict[str, torch.Tensor]:
    """Update i, with a beta, a learning rate and an overshooting of its own; from update 1 on the adversarial task counts."""
    beta, rate = torch.tensor(0.1 * i, device=DEVICE), torch.tensor(1e-4 * (i + 1), device=DEVICE)
    torch.manual_seed(i)
    metrics = step(group, beta, rate, train_discriminator, adversarial=i > 0, overshoot=0.2 * i)
    return {name: value.clone() for name, value in metrics.items()}


DISCRETE = ("model/perplexity", "model/code_usage", "model/token_accuracy")  # one code chosen otherwise is a jump


def assert_same_training(step: TrainingStep, batches, updates: range, eager: TrainingStep | None = None, anew: bool = False) -> None:
    """`step` does what `eager` does: losses, RGB's state, and the weights' movement; `anew`: each update from the state of `eager`."""
    eager = eager or make_step()
    start = eager.generator.flat.clone()
    for i in updates:
        group = [batches[(i + j) % STEPS] for j in range(step.config.optim.accumulate)]
        if anew:
            step.load_state_dict(copy.deepcopy(eager.state_dict()))
        ours, theirs = update(step, group, i), update(eager, group, i)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if DEVICE.type == "cuda" and name in DISCRETE:
                continue
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name, s=i: f"step {s}, {n}: {m}")
        if anew:
            pairs = zip(
                (*step._gradients.tasks, *step._gradients.discriminator), (*eager._gradients.tasks, *eager._gradients.discriminator)
            )
            assert all((row - expected).norm() <= 1e-4 * expected.norm() for row, expected in pairs), f"step {i}"
    for ours, theirs in zip(step.rgb.state_dict().values(), eager.rgb.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    # Adam turns a gradient of rounding noise into a whole step of either sign: single weights may differ, the movement may not.
    movement = (eager.generator.flat - start).norm()
    assert movement > 0
    assert (step.generator.flat - eager.generator.flat).norm() < 0.05 * movement


def test_the_whole_step_compiles_to_one_graph_each_and_trains_alike(batches):
    """The kind of update that has every part, through Dynamo and AOTAutograd."""
    torch._dynamo.reset()
    counters.clear()
    step = make_step()
    step.execution = Execution(step, Way(whole=True), backend="aot_eager")
    assert_same_training(step, batches, range(1, 3))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the gradients, and the update: whatever the schedules, for all batches


def test_compiled_regions_train_alike(batches):
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):  # Inductor has random numbers of its own otherwise
        step = make_step("on")
        counters.clear()
        assert_same_training(step, batches, range(2))
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        assert all(bool(update(step, [batches[i]], i)["finite"]) for i in (2, 3))
        assert counters["stats"]["unique_graphs"] == compiled


class NothingIsReadBack(TorchDispatchMode):
    """Fails at any operation that brings a value to the host or has an output of a data-dependent shape."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"the training step calls {name}: a wait for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_reads_nothing_back(batches, accumulate):
    step = make_step(accumulate=accumulate)
    with NothingIsReadBack(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        bool(torch.ones(()))
    group = batches[:accumulate]
    with NothingIsReadBack():
        for train_discriminator in (False, True):
            metrics = update(step, group, 1, train_discriminator)
    assert bool(metrics["finite"])


def test_every_kind_of_update_goes_through_its_capture(batches, monkeypatch):
    """The way to a captured update, without CUDA: what would be captured is called."""
    calls = []

    class Called:
        def __init__(self, function, device, memory_of=None):
            self.function = function

        def __call__(self, *inputs):
            calls.append(self.function.args[0])
            return self.function(*inputs)

    monkeypatch.setattr(cuda_graph, "Captured", Called)
    step = make_step()
    step.execution = Execution(step, WAYS["capture"])
    for i, kind in enumerate(kinds := [Kind(*flags) for flags in ((False, False), (False, True), (True, False), (True, True))]):
        one = torch.ones((), device=DEVICE)
        assert bool(step(batches[i : i + 1], one, 1e-4 * one, *kind)["finite"])
    assert calls == kinds
    calls.clear()
    for perceives in (True, False):
        assert bool(step.learn_pictures(batches[:1], 1e-4 * one, perceives)["finite"])
    assert calls == [True, False]


@pytest.mark.cuda
def test_captured_training_is_eager_training(batches):
    # The same kernels with the same seeds: also the random numbers agree. The first kind of update replays from its fourth on, others from
    # their second.
    # Gradients are compared one update at a time: two runs drift apart by rounding, and a race between streams would not be seen.
    step, eager = make_step("capture"), make_step()
    for updates in (STEPS + 3, 20):
        assert_same_training(step, batches, range(updates), eager, anew=True)
    for i in range(8):  # another kind, captured into the same memory
        assert bool(update(step, batches[:1], i, train_discriminator=i % 2 == 0)["finite"])
    state = copy.deepcopy(step.state_dict())
    torch.cuda.set_sync_debug_mode("error")
    try:
        one = torch.ones((), device=DEVICE)
        metrics = step(batches[:1], one, 1e-4 * one, True, own_tokens=one, overshoot=one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(metrics["finite"])
    assert not torch.equal(state["optimizer"]["updates"], step.state_dict()["optimizer"]["updates"])


@pytest.mark.cuda
def test_captured_picture_updates_are_eager_ones(batches):
    captured, eager = make_step("capture"), make_step()
    rate = torch.tensor(1e-3, device=DEVICE)
    for i in range(STEPS + 2):
        losses = []
        for step in (captured, eager):
            torch.manual_seed(i)
            losses.append(step.learn_pictures(batches[i % STEPS : i % STEPS + 1], rate, perceives=i % 2 == 0).clone())
        for name, value in losses[1].items():
            torch.testing.assert_close(losses[0][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name, s=i: f"step {s}, {n}: {m}")


@pytest.mark.cuda
def test_a_captured_update_skips_what_is_not_finite(batches):
    step = make_step("capture")
    sequences = [batch.exclude("stills") for batch in batches]  # updates on single frames stand for themselves
    for i in range(6):
        update(step, sequences[:1], i)
    before = step.generator.flat.clone()
    bad = sequences[1].clone()
    bad["action"][0, 0, 0] = float("nan")
    assert not bool(update(step, [bad], 7)["finite"])
    assert torch.equal(before, step.generator.flat)
    assert step.faults.read().skipped == 1
