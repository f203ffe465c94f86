"""Each collapse check on either side of its threshold, and when `Watch` speaks."""

from __future__ import annotations

import dataclasses
import re

import pytest

from aime_fast.config import ControlConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig
from aime_fast.evaluation.collapse import CHECKS, Watch, replay

HEALTHY = {
    "validation/code_usage": 0.4,
    "validation/effective_components": 3.0,
    "validation/slot_overlap": 0.3,
    "validation/loss/kl_z": 12.0,
    "loss/discriminator_image": 1.3,
    "loss/discriminator_temporal": 1.2,
    "loss/generator": 1.5,
    "loss/adversarial": 0.2,
    "validation/psnr": 30.0,
    "validation/psnr_mean_frame": 27.0,
    "validation/probe_attention_db": 0.8,
    "validation/probe_context_nats": 0.3,
    "validation/probe_context_db": 0.0,  # one use is enough
    "validation/probe_action_shuffle_ratio": 1.4,
    "behaviour/action_bias": 0.5,
    "behaviour/value_size": 300.0,
    "behaviour/value_limit": 1000.0,
    "validation/reward_explained": 0.8,
}
# what makes a healthy row collapse, and the same just on the other side of the threshold
CASES = {
    "dead_codebook": ({"validation/code_usage": 0.099}, {"validation/code_usage": 0.101}),
    "one_component": ({"validation/effective_components": 1.19}, {"validation/effective_components": 1.21}),
    "slots_alike": ({"validation/slot_overlap": 0.951}, {"validation/slot_overlap": 0.949}),
    "kl_at_zero": ({"validation/loss/kl_z": 0.09}, {"validation/loss/kl_z": 0.11}),  # Z = 10
    "discriminator_winning": ({"loss/discriminator_temporal": 0.09, "loss/generator": 4.0}, {"loss/discriminator_temporal": 0.11}),
    "attention_unused": ({"validation/probe_attention_db": 0.09}, {"validation/probe_attention_db": 0.11}),
    "context_unused": (
        {"validation/probe_context_nats": 0.009, "validation/probe_context_db": 0.09},
        {"validation/probe_context_nats": 0.009, "validation/probe_context_db": 0.11},
    ),
    "actions_unused": ({"validation/probe_action_shuffle_ratio": 1.04}, {"validation/probe_action_shuffle_ratio": 1.06}),
    "policy_frozen": ({"behaviour/action_bias": 0.96}, {"behaviour/action_bias": 0.94}),
    "critic_diverging": ({"behaviour/value_size": 1501.0}, {"behaviour/value_size": 1499.0}),
    "reward_unknown": ({"validation/reward_explained": -0.01}, {"validation/reward_explained": 0.01}),
}


def make_watch(**fields) -> Watch:
    return Watch(latent_dim=10, max_components=8, **fields)


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_speaks_on_its_side_of_the_threshold_only(name):
    bad, good = CASES[name]
    assert [f.name for f in make_watch(patience=1).look(1, HEALTHY | bad)] == [name]
    watch = make_watch(patience=1)
    assert watch.look(1, HEALTHY | good) == []
    assert watch.flags() == {f"collapse/{check}": 0.0 for check in CHECKS}  # all were made


def test_a_collapse_is_told_once_when_it_begins_and_once_when_it_ends():
    bad = HEALTHY | CASES["kl_at_zero"][0]
    rows = [HEALTHY, bad, HEALTHY, bad, bad, bad, HEALTHY, HEALTHY]
    findings = replay(make_watch(), [{"step": 10 * i} | row for i, row in enumerate(rows)])
    assert [(f.name, f.step, f.begins) for f in findings] == [("kl_at_zero", 40, True), ("kl_at_zero", 60, False)]
    assert "KL_z is 0.09 nats" in str(findings[0])
    assert "--beta" in str(findings[0])


def test_training_rows_are_remembered_until_the_next_validation():
    watch = make_watch(patience=1)
    assert watch.look(1, {"loss/discriminator_image": 0.01, "loss/adversarial": 0.3}) == []
    assert watch.look(2, {"loss/discriminator_image": float("nan"), "loss/elbo": None}) == []
    assert [f.name for f in watch.look(3, {"validation/psnr": 20.0})] == ["discriminator_winning"]
    assert watch.flags() == {"collapse/discriminator_winning": 1.0}  # nothing is said of what was not measured


def test_what_is_no_collapse():
    watch = make_watch(patience=1)
    before_the_adversarial_task = {"loss/discriminator_image": 0.01, "loss/adversarial": 0.0}
    assert watch.look(1, HEALTHY | before_the_adversarial_task) == []
    single = Watch(latent_dim=10, max_components=1, patience=1)
    assert single.look(1, HEALTHY | CASES["one_component"][0]) == []


def test_a_model_that_draws_nothing_is_not_said_to_ignore_its_inputs():
    watch = make_watch(patience=1)
    ignored = {key: value for name in CASES if name.endswith("_unused") for key, value in CASES[name][0].items()}
    assert watch.look(1, HEALTHY | ignored | {"validation/psnr": 27.9}) == []
    assert {f.name for f in watch.look(2, HEALTHY | ignored)} == {"attention_unused", "context_unused", "actions_unused"}


def test_every_flag_of_a_remedy_exists():
    known = {
        f.name for cls in (DataConfig, ModelConfig, LossConfig, OptimConfig, ControlConfig, RunConfig) for f in dataclasses.fields(cls)
    }
    flags = {flag.replace("-", "_") for _, remedy in CHECKS.values() for flag in re.findall(r"--([a-z-]+)", remedy)}
    assert flags <= known
