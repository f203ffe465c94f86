"""Policies of online runs, read from their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aime_fast.config import Config, DataConfig
from aime_fast.control.actor_critic import Actor, Critic, policy_width
from aime_fast.control.planner import PlanningPolicy
from aime_fast.control.policy import WorldModelPolicy
from aime_fast.errors import CheckpointError, ConfigError
from aime_fast.training.checkpoint import fitting, load_model

SAME = ("domain", "task", "image_size", "frame_skip", "camera", "render_quality")  # settings in which a policy and what it plays must agree


def load_policy(
    run_or_checkpoint: str | Path, device: torch.device | str = "cpu", sample: bool = False
) -> tuple[WorldModelPolicy, Config, dict[str, Any]]:
    """(policy, config, info) as `load_model` gives the last two: the average of the actor, without noise; `sample`: the actor that plays
    in training, with its noise.

    Raises CheckpointError as `load_model`, and where the run has no policy.
    """
    model, config, info = load_model(run_or_checkpoint, device)
    if info["actor"] is None:
        raise CheckpointError(f"{info['checkpoint']}: this run has no policy; train one with: python -m aime_fast.train --online")
    name = "actor" if sample else "average_actor"
    actor = _restored(Actor(policy_width(model), config.control.policy_dim, model.action_dim), name, info, device)
    return WorldModelPolicy(model.requires_grad_(False), actor, sample), config, info


def load_planning_policy(
    run_or_checkpoint: str | Path, device: torch.device | str = "cpu"
) -> tuple[PlanningPolicy, Config, dict[str, Any]]:
    """As `load_policy`, but one that plans, also with the model of a run that is not online: then without a critic."""
    model, config, info = load_model(run_or_checkpoint, device)
    if config.data.data == "synthetic":
        raise CheckpointError(f"{info['checkpoint']}: this run's episodes are synthetic, so there is no simulator to plan in")
    critic = None
    if info["critic"] is not None:
        critic = _restored(Critic(policy_width(model), config.control.policy_dim), "critic", info, device)
    return PlanningPolicy(model.requires_grad_(False), critic, discount=config.control.discount), config, info


def _restored(module: nn.Module, name: str, info: dict[str, Any], device: torch.device | str) -> nn.Module:
    """A module with the weights that a checkpoint has under this name, on the device, without gradients."""
    with fitting(info["checkpoint"]):
        module.load_state_dict(info[name])
    return module.to(device).requires_grad_(False)


def check_fits(run: str, policy_of: DataConfig, plays: DataConfig) -> None:
    """Raises ConfigError where a policy would play another task, or see other pictures, than it was trained on."""
    for name in SAME:
        trained, given = getattr(policy_of, name), getattr(plays, name)
        if trained != given:
            flag = name.replace("_", "-")
            raise ConfigError(f"--policy {run}: it was trained with --{flag} {trained}, not {given}; pass --{flag} {trained}")


def make_recording_policy(run: str) -> WorldModelPolicy:
    """The policy of a collector's worker, with noise; called in the worker."""
    torch.set_num_threads(1)
    return load_policy(run, sample=True)[0]


def make_planning_policy(run: str) -> PlanningPolicy:
    """As `make_recording_policy`, a planner in the run's world model."""
    torch.set_num_threads(1)
    return load_planning_policy(run)[0]
