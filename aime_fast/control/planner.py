"""PlanningPolicy: actions that TorchRL's CEM or MPPI planner finds in roll-outs that the world model imagines, in latent space alone.

The planner sees the world model as an environment, `make_latent_environment`. It ranks action sequences by the sum of the rewards of a
roll-out, so the environment's rewards are discounted ones, and the last of a roll-out holds the critic's value too.

Limits of the planners of TorchRL 0.14:
* No warm start: every plan begins at mean 0 and deviation 1, whatever was planned for the frame before. Only the first action is
  returned, so the rest of a plan is not to be had.
* The action is the mean of the best candidates of the last iteration; no candidate is certain to be as good. Candidates outside the
  bounds are clamped to them, and there is no least deviation: few candidates and many iterations settle early.
* CEM takes the deviation of `top_k` sequences, which is NaN for one. MPPI takes exp(temperature * advantage) as it is, which overflows
  for large returns; so here an advantage is a return minus that of the best candidate.
* Noise comes from torch's global generator, on the device; plans repeat after `torch.manual_seed`.
Sources: Botev et al. 2013 (CEM); Williams et al., arXiv 1509.01149 (MPPI); Hansen et al., arXiv 2203.04955 (a value after the last action).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from aime_fast.control.actor_critic import Critic, policy_features
from aime_fast.control.policy import FramePolicy
from aime_fast.imagination.frame import State, advance, initial_state, predict

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

FIELDS = ("lstm", "hidden", "latents", "delta", "context")  # of a `State` that is not fresh, those that `advance` and `predict` read


def pack(state: State, weight: Tensor | None = None) -> TensorDict:
    """The `FIELDS` of a state of N rows as a TensorDict [N], with `weight` [N, 1], which is 1 where none is given."""
    hidden = state.hidden
    weight = torch.ones_like(hidden[:, :1]) if weight is None else weight
    return TensorDict({name: getattr(state, name) for name in FIELDS} | {"weight": weight}, hidden.shape[:1], device=hidden.device)


def unpack(tensordict: TensorDictBase) -> State:
    """The inverse of `pack`, without attention and cache: a state that neither `observe` nor `imagine` takes."""
    fresh = torch.zeros(tensordict.batch_size, dtype=torch.bool, device=tensordict["hidden"].device)
    return State(**{name: tensordict[name] for name in FIELDS}, fresh=fresh, attention=None, cache=None)


class LatentStep(TensorDictModuleBase):
    """An action in imagination: `advance`, the outcome heads, then `predict` by the mean of the prior.

    Reads `FIELDS` [*N, ...] and `weight` [*N, 1] before an action, and `action` [*N, A]; writes the first two as they are before the next
    one, and `reward` [*N, 1], the expected one times `weight`. `weight` is the product of discount and probability that the episode goes
    on, over the actions before: what a reward counts for. So no imagined episode is ever done.

    Args: model: world model in eval mode; discount: of a reward one action later.
    """

    def __init__(self, model: nn.Module, discount: float):
        super().__init__()
        self.in_keys, self.out_keys = [*FIELDS, "weight", "action"], [*FIELDS, "weight", "reward"]
        self.model, self.discount = model, discount

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        flat = tensordict.select(*self.in_keys).reshape(-1)
        acted = advance(self.model, unpack(flat), flat["action"])
        reward, continues = self.model.outcomes.expected(acted.hidden, acted.latents)
        _, after = predict(self.model, acted)
        out = pack(after, flat["weight"] * self.discount * continues.unsqueeze(-1))
        out["reward"] = flat["weight"] * reward.unsqueeze(-1)
        return tensordict.update(out.reshape(tensordict.batch_size))


def make_latent_environment(model: nn.Module, critic: Critic | None = None, discount: float = 1.0) -> EnvBase:
    """The world model as a TorchRL environment of any batch size; a step is a `LatentStep`, actions are in [-1, 1].

    Of a critic, `rollout` adds its value after the last action to the last reward, times `weight`: the rewards of a roll-out add up to the
    discounted return. Its start is a TensorDict that `pack` gives, of a state from `observe` or `predict`; `reset` imagines a first frame.
    The class is defined in this function so that `aime_fast` imports without TorchRL.
    """
    from torchrl.data import Bounded, Unbounded
    from torchrl.envs import ModelBasedEnvBase
    from torchrl.envs.utils import make_composite_from_td

    like = model.decoder.background

    class LatentEnvironment(ModelBasedEnvBase):
        def __init__(self):
            super().__init__(LatentStep(model, discount), device=like.device)
            self.observation_spec = make_composite_from_td(pack(initial_state(model, 1))[0])
            self.action_spec = Bounded(-1.0, 1.0, shape=(model.action_dim,), device=like.device, dtype=like.dtype)
            self.reward_spec = Unbounded(shape=(1,), device=like.device, dtype=like.dtype)

        def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
            shape = self.batch_size if tensordict is None else tensordict.batch_size
            return pack(predict(model, initial_state(model, shape.numel()))[1]).reshape(shape)

        def rollout(self, *args: Any, **kwargs: Any) -> TensorDictBase:
            out = super().rollout(*args, **kwargs)
            if critic is not None:
                last = out[..., -1]["next"]
                reward = out["next", "reward"]
                reward[..., -1, :] += last["weight"] * critic.value(policy_features(unpack(last))).unsqueeze(-1)
                out["next", "reward"] = reward
            return out

    return LatentEnvironment()


def _advantage(tensordict: TensorDictBase) -> TensorDictBase:
    """Of roll-outs [*N, candidates, T]: `advantage` [*N, candidates, T, 1], the same at all T: the return minus that of the best."""
    reward = tensordict["next", "reward"]
    returns = reward.sum(-2, keepdim=True)
    return tensordict.set("advantage", (returns - returns.amax(-3, keepdim=True)).expand_as(reward))


class PlanningPolicy(FramePolicy):
    """Chooses by a plan of its own for each frame, whose first action it takes.

    Args:
        model: world model in eval mode, without gradients.
        critic: on the same device, of the value after the planned actions; None: nothing counts after them.
        planner: cem, the mean of the best candidates; mppi, their mean weighted by exp(temperature * return).
        horizon: planned actions. candidates, iterations: sequences imagined at once, and how often. top_k: the best of them.
        discount: of a reward one action later.
        temperature: of mppi.

    Raises ValueError for a number out of range.
    """

    def __init__(
        self, model: nn.Module, critic: Critic | None = None, planner: Literal["cem", "mppi"] = "cem", horizon: int = 12,
        candidates: int = 64, iterations: int = 3, top_k: int = 8, discount: float = 1 - 1 / 333, temperature: float = 0.5,
    ):  # fmt: skip
        super().__init__(model)
        if planner not in ("cem", "mppi"):
            raise ValueError(f"planner={planner!r}: expected 'cem' or 'mppi'")
        if horizon < 1 or iterations < 1:
            raise ValueError(f"horizon={horizon}, iterations={iterations}: expected at least 1 of each")
        if not 2 <= top_k <= candidates:
            raise ValueError(f"top_k={top_k}, candidates={candidates}: expected 2 <= top_k <= candidates; one has no deviation")
        if not 0 < discount <= 1 or temperature <= 0:
            raise ValueError(f"discount={discount}, temperature={temperature}: expected 0 < discount <= 1 and a positive temperature")
        from torchrl.modules import CEMPlanner, MPPIPlanner

        environment = make_latent_environment(model, critic, discount)
        sizes = {"planning_horizon": horizon, "optim_steps": iterations, "num_candidates": candidates, "top_k": top_k}
        if planner == "cem":
            self.planner = CEMPlanner(environment, **sizes)
        else:
            self.planner = MPPIPlanner(environment, _advantage, temperature, **sizes)

    def choose(self, seen: State) -> Tensor:
        return self.planner(pack(seen))["action"]
