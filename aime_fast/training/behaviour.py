"""Updates of actor and critic, in roll-outs that the world model imagines from inferred states."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from aime_fast.config import ControlConfig
from aime_fast.control.actor_critic import Actor, Critic, act, act_in_imagination, lambda_returns, policy_width
from aime_fast.imagination.frame import State
from aime_fast.imagination.sequence import Latents, predict_latents
from aime_fast.layers import previous, starts
from aime_fast.runtime.cuda_graph import Captured
from aime_fast.training.adam import Adam, clip_factor
from aime_fast.training.arena import Arena, GradientRows
from aime_fast.training.ema import EMA
from aime_fast.training.faults import Faults
from aime_fast.training.latent_phase import LatentReplay

BURN_IN = 8  # observed frames before the first state that is imagined from
PER_PIECE = 8  # states of a piece of an episode
CLIP = 1.0  # largest gradient norm, of the actor and of the critic
RANGE = (0.05, 0.95)  # quantiles of the returns between which their range is taken
RANGE_RATE = 0.01  # of its moving average
TERMS = ("actor", "critic", "gradient_norm/actor", "gradient_norm/critic")


@torch.no_grad()
def states_of(model: nn.Module, pieces: Latents, frames: slice) -> State:
    """The states before the actions of some frames of pieces [B, T], whose recurrence begins empty: N = B x frames rows."""
    start = starts(None, *pieces.mean.shape[:2], pieces.mean.device)
    known = predict_latents(model, pieces.mean, pieces.context, pieces.actions, start, sample=False)
    before, seen = (previous(x, start) for x in (known.lstm, known.hidden)), torch.zeros_like(start)
    of_frame = (*before, pieces.mean, known.delta, seen, pieces.context, pieces.attention)
    return State(*(x[:, frames].flatten(0, 1) for x in of_frame), cache=None)


def draw_starts(model: nn.Module, replay: LatentReplay, count: int) -> State:
    """About `count` states to imagine from: three of four anywhere in an episode, after `BURN_IN` frames, the others in its first frames.

    The policy meets an empty recurrence at the beginning of each episode it plays, and it alone decides whether a pole falls there.
    """
    pieces = math.ceil(count / PER_PIECE)
    beginnings = max(1, pieces // 4)
    anywhere = replay.draw(max(1, pieces - beginnings), BURN_IN + PER_PIECE)
    drawn = (states_of(model, anywhere, slice(BURN_IN, None)), states_of(model, replay.draw_beginnings(beginnings, PER_PIECE), slice(None)))
    return State(*(None if part[0] is None else torch.cat(part) for part in zip(*drawn)))


def entropy_weight(control: ControlConfig, share: float) -> float:
    """Weight of the actor's entropy where a `share` of the run's environment frames, 0 to 1, is played.

    Where it has another one at the end, it changes by the same factor with each frame of the second half (docs/control.md has what it did).
    """
    first, last = control.actor_entropy, control.final_entropy
    if last is None or not first:
        return first
    return first * (last / first) ** max(0.0, 2 * share - 1)


class Behaviour:
    """Actor and critic, their averages, their optimizers and the range of returns.

    The actor plays in training; its average is the policy that comes out: what an actor earns in whole episodes changes from one cycle to
    the next by hundreds, since a small lean that no roll-out of a second tells of drives a cart off in ten.

    Args: model: world model in eval mode, without gradients; control: settings; captures: an update is one CUDA graph; compiles: an
    imagined frame, for the number of states of the first update.

    Attributes: update: `_learn`, as it is run; average_actor, average_critic: `EMA` of each; the critic's completes returns.
    """

    def __init__(self, model: nn.Module, control: ControlConfig, captures: bool = False, compiles: bool = False):
        self.model, self.control = model, control
        device = model.decoder.background.device
        width = policy_width(model)
        self.actor = Actor(width, control.policy_dim, model.action_dim).to(device)
        self.critic = Critic(width, control.policy_dim).to(device)
        self._arenas = [Arena(module.parameters()) for module in (self.actor, self.critic)]
        self.average_actor = EMA(self.actor, control.actor_decay, self._arenas[:1])
        self.average_critic = EMA(self.critic, control.critic_decay, self._arenas[1:])
        self._rows = [GradientRows(arena, 1) for arena in self._arenas]
        self._adams = [Adam(arena.flat) for arena in self._arenas]
        self._rates = [torch.tensor(rate, device=device) for rate in (control.actor_lr, control.critic_lr)]
        self._act = torch.compile(act, fullgraph=True, dynamic=False) if compiles else act
        self.range = torch.zeros((), device=device)
        self._entropy = torch.tensor(control.actor_entropy, device=device)
        self.faults = Faults(TERMS, device)
        self.update = Captured(self._learn, device) if captures else self._learn

    def calm(self, share: float) -> None:
        """Sets the weight of the entropy for a run of whose environment frames this `share` is played."""
        self._entropy.fill_(entropy_weight(self.control, share))

    def _learn(self, start: State) -> dict[str, Tensor]:
        """One update from the states of `draw_starts`; one whose losses or gradients are not finite changes nothing.

        Returns: scalars by name, which a captured update overwrites at the next one: losses and gradient norms; imagined_return,
        imagined_reward; entropy; range, of the returns; action_bias, the largest size of an action's mean over all states; value_size, the
        mean size of values; value_limit, the value of the largest reward in every step.
        """
        c = self.control
        imagined = act_in_imagination(self.model, self.actor, start, c.imagination_horizon, act_once=self._act)
        discounts = c.discount * imagined.continues
        returns = lambda_returns(imagined.rewards, discounts, self.average_critic.model.value(imagined.features[1:]), c.return_decay)
        weight = torch.cat([torch.ones_like(discounts[:1]), discounts[:-1]]).cumprod(0).detach()  # discounted chance to come so far
        low, high = (returns.detach().flatten().quantile(share) for share in RANGE)
        found = (high - low).clamp_min(1.0)
        scale = torch.where(self.range == 0, found, self.range.lerp(found, RANGE_RATE))
        actor_loss = -(weight * (returns / scale - self._entropy * imagined.log_probs)).mean()
        logits = self.critic(imagined.features[:-1].detach())
        critic_loss = (weight * self.critic.two_hot.nll(logits, returns)).mean()
        gradients = [row.gather({"behaviour": loss})[0] for row, loss in zip(self._rows, (actor_loss, critic_loss))]
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        measured = dict(zip(TERMS, (actor_loss.detach(), critic_loss.detach(), *norms)))
        finite = self.faults.record(measured)
        for adam, gradient, norm, rate in zip(self._adams, gradients, norms, self._rates):
            adam.update(gradient * clip_factor(norm, CLIP), rate, finite)
        self.range.copy_(torch.where(finite, scale, self.range))
        for average in (self.average_actor, self.average_critic):
            average.update(finite)
        return measured | {
            "imagined_return": returns.detach().mean(), "imagined_reward": imagined.rewards.detach().mean(),
            "entropy": -imagined.log_probs.detach().mean(), "range": self.range.clone(),
            "action_bias": imagined.actions.detach().mean((0, 1)).abs().max(),
            "value_size": self.critic.two_hot.decode(logits.detach()).abs().mean(),
            "value_limit": imagined.rewards.detach().abs().max() / (1 - c.discount),
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizers, range of returns and the count of updates not made."""
        return {
            **{name: module.state_dict() for name, module in self._modules().items()},
            "averaged": [average.updates for average in (self.average_actor, self.average_critic)],
            "optimizers": [adam.state_dict() for adam in self._adams], "range": self.range, "faults": self.faults.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        for average, updates in zip((self.average_actor, self.average_critic), state["averaged"]):
            average.updates.copy_(updates)
        for adam, saved in zip(self._adams, state["optimizers"]):
            adam.load_state_dict(saved)
        self.range.copy_(state["range"])
        self.faults.load_state_dict(state["faults"])

    def _modules(self) -> dict[str, nn.Module]:
        averages = {"average_actor": self.average_actor.model, "average_critic": self.average_critic.model}
        return {"actor": self.actor, "critic": self.critic, **averages}
