"""Measure how many steps a second are imagined in latent space: by our model, eager and with a compiled frame, and by TorchRL's RSSM as its
DreamerV3 actor loss rolls it.

Both have the widths of the tier (h of the LSTM and of the GRU, and all hidden layers), untrained weights, the same number of starts and
actions, and an actor of their own. A row is of roll-outs alone, or of roll-outs and the actor's gradient of the imagined rewards. They take
turns in one process; the figures are medians of rounds, with the 20th and 80th percentile. On a CPU alone: a GPU needs the captured
update, which `aime_fast.train --online --compile` has.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from aime_fast.config import PRESETS, preset
from aime_fast.control.actor_critic import Actor, act, act_in_imagination, policy_width
from aime_fast.imagination.frame import initial_state
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder
from profiling.machine import describe, title
from profiling.rows import spread, write_rows

ACTIONS = 1  # A


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench imagine`."""
    parser.add_argument("--tier", choices=tuple(PRESETS), nargs="+", default=["1"], help="default: 1")
    parser.add_argument("--starts", type=int, default=64, metavar="N", help="states imagined from; default 64")
    parser.add_argument("--horizon", type=int, default=15, metavar="H", help="actions imagined; default 15")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default 20")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: all")
    parser.add_argument("--json", metavar="FILE", help="write the rows here, each with machine, versions, commit and command")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Measure, print and write; returns the exit status."""
    for name in ("starts", "horizon", "rounds"):
        if getattr(options, name) < 1:
            usage_error(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    print(f"{title(device)}\n{'tier':<6}{'model':<15}{'gradient':<10}{'parameters':>12}{'steps/s':>12}{'p20':>12}{'p80':>12}")
    rows = []
    for tier in options.tier:
        torch._dynamo.reset()  # it compiles a function so many times, whatever the model
        contestants = {
            "ours": _ours(tier, options, False),
            "ours compiled": _ours(tier, options, True),
            "torchrl RSSM": _peer(tier, options),
        }
        for gradient in (False, True):
            works = {name: partial(roll_out, gradient) for name, (roll_out, _) in contestants.items()}
            for name, rates in _take_turns(works, options).items():
                row = {
                    "tier": tier, "model": name, "gradient": gradient, "parameters": contestants[name][1],
                    "imagined_steps_per_second": spread(rates), "starts": options.starts, "horizon": options.horizon,
                }  # fmt: skip
                rows.append(row)
                found = row["imagined_steps_per_second"]
                print(
                    f"{tier:<6}{name:<15}{'yes' if gradient else 'no':<10}{row['parameters']:>12,}{found['median']:>12.0f}"
                    f"{found['p20']:>12.0f}{found['p80']:>12.0f}",
                    flush=True,
                )
    write_rows(options.json, describe(device), rows)
    return 0


def _take_turns(works: dict[str, Callable[[], None]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Imagined steps a second of each round, after two that do not count."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(options.rounds + 2):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number >= 2:
                rates[name].append(options.starts * options.horizon / (time.perf_counter() - began))
    return rates


def _parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def _ours(tier: str, options: argparse.Namespace, compiles: bool) -> tuple[Callable[[bool], None], int]:
    """(a roll-out, with or without gradient; parameters that it uses)."""
    act_once = torch.compile(act, fullgraph=True, dynamic=False) if compiles else act
    config = preset(tier)
    model = DPGMMVariationalRecurrentAutoencoder.from_config(config, ACTIONS).eval().requires_grad_(False)
    actor = Actor(policy_width(model), config.model.hidden_dim, ACTIONS)
    state = initial_state(model, options.starts)

    def roll_out(gradient: bool) -> None:
        with torch.set_grad_enabled(gradient):
            rewards = act_in_imagination(model, actor, state, options.horizon, act_once=act_once).rewards
            if gradient:
                torch.autograd.grad(rewards.mean(), list(actor.parameters()), allow_unused=True)

    return roll_out, _parameters(model.recurrence, model.prior, model.outcomes, actor)


def _peer(tier: str, options: argparse.Namespace) -> tuple[Callable[[bool], None], int]:
    """The same of TorchRL's DreamerV3: `DreamerEnv` over its RSSM, as `DreamerV3ActorLoss` rolls it."""
    from tensordict import TensorDict
    from torchrl.envs.utils import ExplorationType, set_exploration_type

    from profiling.peers.dreamer_v3_agent import DreamerV3Agent, DreamerV3AgentConfig

    width = preset(tier).model.hidden_dim
    agent = DreamerV3Agent(64, ACTIONS, config=DreamerV3AgentConfig(belief_dim=width, hidden_dim=width, behaviour_layers=2))
    agent.world_model.requires_grad_(False)
    environment = agent.environment
    latent = agent.world_model.start(options.starts)
    start = TensorDict({"state": latent.state, "belief": latent.belief}, batch_size=[options.starts])

    def roll_out(gradient: bool) -> None:
        with torch.set_grad_enabled(gradient), set_exploration_type(ExplorationType.RANDOM):
            film = environment.rollout(
                options.horizon, agent.actor, auto_reset=False, tensordict=environment.reset(start.clone()), break_when_any_done=False
            )
            if gradient:
                torch.autograd.grad(film["next", "reward"].mean(), list(agent.actor.parameters()), allow_unused=True)

    return roll_out, _parameters(agent.world_model.prior, agent.world_model.reward, agent.actor)
