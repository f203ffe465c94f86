"""One update: it is the loop of the specification, and it is all or nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from aime_fast.config import Config, preset, to_dict
from aime_fast.data import make_batches, normalise
from aime_fast.errors import NonFiniteError
from aime_fast.multi_task_learning import RGB, LossAggregator
from aime_fast.training import TrainingStep, check_tensor
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


def config_of(**optim) -> Config:
    config = preset("debug")
    data = dataclasses.replace(config.data, data="synthetic", augment=False, prefetch=0, stills=0)
    return dataclasses.replace(config, data=data, optim=dataclasses.replace(config.optim, **optim))


@pytest.fixture(scope="module")
def batches():
    train, validation = make_batches(config_of().data, 0, "cpu")
    yield [next(train) for _ in range(4)]
    train.close()
    validation.close()


def make_model(config: Config) -> DPGMMVariationalRecurrentAutoencoder:
    torch.manual_seed(0)
    return DPGMMVariationalRecurrentAutoencoder.from_config(config, 2)


def update(step: TrainingStep, batches, train_discriminator=True, beta=0.5, rate=1e-3):
    return step(batches, torch.tensor(beta), torch.tensor(rate), train_discriminator)


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def weights(step: TrainingStep) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in step.model.state_dict().items()}


def state_of(step: TrainingStep) -> list[torch.Tensor]:
    """Everything else that an update changes."""
    parts = (step.optimizer, step.discriminator_optimizer, step.rgb)
    return [*(v.clone() for part in parts for v in part.state_dict().values()), *(v.clone() for v in step.ema.model.state_dict().values())]


def test_step_is_the_loop_of_the_specification(batches):
    config = config_of()
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, towers_lr_scale=0.5))
    step = TrainingStep(make_model(config), config)
    model = copy.deepcopy(step.model)
    optim, rgb = config.optim, RGB()
    rgb.get_share_params = model.get_share_params
    scaled = {
        optim.perceiver_lr_scale: set(model.perceiver_io.parameters()),
        optim.towers_lr_scale: {*model.encoder.parameters(), *model.decoder.parameters()},
    }
    scaled[1.0] = set(model.generator_parameters()).difference(*scaled.values())
    optimizer = torch.optim.Adam(
        [{"params": [p for p in model.generator_parameters() if p in found], "lr": 1e-3 * scale} for scale, found in scaled.items()],
        betas=(optim.adam_beta1, 0.999),
    )
    start = flat(model.generator_parameters())
    for seed, batch in enumerate(batches[:2]):
        anchor = copy.deepcopy(step.ema.model)
        torch.manual_seed(seed)
        update(step, [batch], train_discriminator=False)

        torch.manual_seed(seed)
        inputs = normalise(batch["pixels"]), batch["action"], batch["is_init"]
        brought = batch["reward"], batch["discount"]  # own_tokens: as a tensor, it draws random numbers
        outputs = model.forward_sequence(*inputs, ema=anchor, own_tokens=torch.zeros(()), brought=brought)
        _, task_losses = LossAggregator(**to_dict(config.loss)).compute_losses(outputs, beta=0.5)
        optimizer.zero_grad()
        rgb.backward(task_losses)
        torch.nn.utils.clip_grad_norm_(model.generator_parameters(), optim.grad_clip)
        optimizer.step()
        grads = dict(zip(model.generator_parameters(), step.model.generator_parameters()))
        ours = dict(zip(step.generator.parameters, step.generator.split(step.gradient)))
        difference = flat(p.grad - ours[grads[p]] for p in grads)
        assert difference.norm() < 1e-3 * step.gradient.norm()
    # Adam turns a rounding error in a gradient near zero into a whole step, so single weights may differ, their movement may not.
    ours, theirs = flat(step.model.generator_parameters()), flat(model.generator_parameters())
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_without_the_adversarial_task_its_gradient_is_zero(batches):
    config, results = config_of(), {}
    for adversarial in (True, False):
        step = TrainingStep(make_model(config), config)
        torch.manual_seed(0)
        metrics = step(batches[:1], torch.tensor(0.5), torch.tensor(0.0), False, adversarial=adversarial)
        results[adversarial] = step._gradients.tasks.clone(), metrics
    (with_task, others), (without, metrics) = results[True], results[False]
    assert with_task[3].any()
    assert not without[3].any()
    torch.testing.assert_close(without[:3], with_task[:3])
    assert metrics["loss/adversarial"] == 0
    assert metrics["loss/generator"] == others["loss/generator"]  # still logged


def test_discriminators_learn_only_when_told_and_the_generator_never_moves_them(batches):
    config = config_of()
    step = TrainingStep(make_model(config), config)
    before = weights(step)
    update(step, batches[:1], train_discriminator=False)
    middle = weights(step)
    assert all(torch.equal(before[name], middle[name]) for name in before if "discriminator" in name)
    metrics = update(step, batches[:1], train_discriminator=True)
    after = weights(step)
    assert not any(torch.equal(middle[name], after[name]) for name in before if "discriminator" in name and "weight" in name)
    assert bool(metrics["finite"])
    assert metrics.batch_size == torch.Size([])


def test_accumulated_gradient_is_the_mean_over_the_batches(batches):
    config = config_of()
    rows = []
    for group in (batches[:1], batches[1:2], batches[:2]):
        step = TrainingStep(make_model(config).eval(), config)  # in eval mode nothing is sampled and the codebook does not change
        update(step, group, train_discriminator=False, beta=0.0)  # the KL is taken at a sample
        rows.append(step._gradients.tasks.clone())
    torch.testing.assert_close(rows[2], (rows[0] + rows[1]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("where", ["action", "loss", "discriminator"])
def test_a_bad_update_changes_nothing_and_is_named(batches, where, monkeypatch):
    config = config_of()
    step = TrainingStep(make_model(config), config)
    update(step, batches[:1])
    bad = batches[1].clone()
    if where == "action":
        bad["action"][1, 2, 0] = float("nan")
    elif where == "discriminator":  # finite losses, a discriminator gradient that is not
        gather = step._discriminator_row.gather
        monkeypatch.setattr(step._discriminator_row, "gather", lambda *args: gather(*args).index_fill(1, torch.tensor([5]), torch.inf))
    else:  # finite outputs, one infinite loss
        monkeypatch.setattr(step.losses, "config", dataclasses.replace(step.losses.config, lambda_recon=float("inf")))
    before, others = weights(step), state_of(step)
    metrics = update(step, [bad])
    assert not bool(metrics["finite"])
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())
    assert all(torch.equal(old, new) for old, new in zip(others, state_of(step)))
    assert step.faults.read().skipped == 1
    first = {
        "action": r"batch 'action' at step 7: 1 of 20 .*\(1, 2, 0\)",
        "loss": "loss/elbo at step 7",
        "discriminator": "gradient of the discriminator loss for .* at step 7",
    }[where]
    with pytest.raises(NonFiniteError, match=first):
        raise step.diagnose(7)
    monkeypatch.undo()
    assert bool(update(step, batches[:1])["finite"])
    assert all(value.isfinite().all() for value in step.ema.model.state_dict().values())


def test_check_tensor_names_place_and_count():
    x = torch.zeros(2, 3)
    assert check_tensor("x", x) is x
    assert check_tensor("tokens", torch.arange(3)).dtype == torch.int64
    x[0, 2], x[1, 1] = float("nan"), float("-inf")
    with pytest.raises(FloatingPointError, match=r"x at step 3: 2 of 6 .* \(1 nan, 1 infinite\), the first at index \(0, 2\)"):
        check_tensor("x", x, 3)
