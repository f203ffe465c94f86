"""Actor and critic, and what they learn from: roll-outs that the world model imagines, in latent space alone.

Actor: a normal with learnt scale, squashed by tanh. Critic: two-hot, with a slow average that completes lambda-returns. The actor
climbs the lambda-return through the imagined frames, divided by the range of returns. Sources: Hafner et al., arXiv 1912.01603 (gradient
through the model), arXiv 2301.04104 (two-hot critic, range of returns).

TorchRL's `DreamerV3ActorLoss` is not taken: it rolls a TensorDict environment of `state` and `belief` frame by frame, which `Behaviour`
could not capture as one CUDA graph, and a `State` has more than two parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.control.two_hot import BINS, TwoHot
from aime_fast.imagination.frame import State, advance, predict
from aime_fast.layers import DELTA_SCALE, near_zero

LEAST_STD = 0.1  # of an action before tanh
MOST_STD = 1.0


def policy_features(state: State) -> Tensor:
    """What is known before an action, [B, Dh + 2 Z + Dc], of a state from `observe` or `predict`: h_{t-1}, m_t, delta_t, c_t."""
    return torch.cat([state.hidden, state.latents, DELTA_SCALE * state.delta, state.context], -1)


def policy_width(model: nn.Module) -> int:
    """The width of `policy_features`."""
    return model.recurrence.hidden_dim + 2 * model.latent_dim + model.perceiver_io.context_dim


def network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two layers with RMS norm and SiLU, and a last one that starts near zero."""
    layers = (nn.Linear(inputs, width), nn.RMSNorm(width), nn.SiLU(), nn.Linear(width, width), nn.RMSNorm(width), nn.SiLU())
    return nn.Sequential(*layers, near_zero(nn.Linear(width, outputs)))


class Actor(nn.Module):
    """Policy features [..., F] -> actions [..., A] in (-1, 1)."""

    def __init__(self, features: int, width: int, action_dim: int):
        super().__init__()
        self.layers = network(features, width, 2 * action_dim)

    def distribution(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard deviation) [..., A] of the action before tanh."""
        mean, spread = self.layers(features).chunk(2, -1)
        return 3 * (mean / 3).tanh(), LEAST_STD + (MOST_STD - LEAST_STD) * (spread + 2).sigmoid()

    def forward(self, features: Tensor, sample: bool = True) -> tuple[Tensor, Tensor | None]:
        """(actions [..., A], their log-density [...]); not `sample`: (tanh of the mean, None)."""
        mean, std = self.distribution(features)
        if not sample:
            return mean.tanh(), None
        noise = torch.randn_like(mean)
        raw = mean + std * noise
        log_tanh = 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh(raw)^2)
        log_prob = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi) - log_tanh
        return raw.tanh(), log_prob.sum(-1)


class Critic(nn.Module):
    """Policy features [..., F] -> logits [..., BINS] of the value."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.layers = network(features, width, BINS)
        self.two_hot = TwoHot()

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)

    def value(self, features: Tensor) -> Tensor:
        """[..., F] -> [...]."""
        return self.two_hot.decode(self(features))


class Imagined(NamedTuple):
    """Roll-outs of H actions from N states."""

    features: Tensor  # [H + 1, N, F], before each action and after the last
    actions: Tensor  # [H, N, A]
    log_probs: Tensor  # [H, N]
    rewards: Tensor  # [H, N]
    continues: Tensor  # [H, N], probabilities


def act(model: nn.Module, actor: Actor, state: State, sample: bool) -> tuple[Tensor, Tensor, Tensor | None, State, State]:
    """One action: (features before it [N, F], it [N, A], its log-density [N], the state after it, the next state before an action).

    The actor reads features without gradient: an action is judged by what it brings, not by what it shows of the next.
    """
    features = policy_features(state)
    action, log_prob = actor(features.detach())
    acted = advance(model, state, action)
    return features, action, log_prob, acted, predict(model, acted, sample)[1]


def act_in_imagination(
    model: nn.Module, actor: Actor, state: State, horizon: int, sample: bool = True, act_once: Callable[..., Any] = act
) -> Imagined:
    """The actor's own roll-outs from N states before their actions; `sample`: latents are samples of the prior; `act_once`: `act`,
    or compiled."""
    features, actions, log_probs, after = [], [], [], []
    for _ in range(horizon):
        before, action, log_prob, acted, state = act_once(model, actor, state, sample)
        features.append(before)
        actions.append(action)
        log_probs.append(log_prob)
        after.append((acted.hidden, acted.latents))
    features.append(policy_features(state))
    hidden, latents = (torch.stack(part) for part in zip(*after))
    rewards, continues = model.outcomes.expected(hidden, latents)
    return Imagined(*map(torch.stack, (features, actions, log_probs)), rewards, continues)


def lambda_returns(rewards: Tensor, discounts: Tensor, values: Tensor, decay: float) -> Tensor:
    """Returns [H, N] of each action: R_t = r_t + d_t ((1 - decay) v_{t+1} + decay R_{t+1}), R_H = v_H.

    Args: rewards, discounts [H, N]; values [H, N], after each action.
    """
    after, returns = values[-1], []
    for reward, discount, value in zip(*(x.flip(0) for x in (rewards, discounts, values))):
        after = reward + discount * ((1 - decay) * value + decay * after)
        returns.append(after)
    return torch.stack(returns[::-1])
