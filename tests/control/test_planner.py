"""Planning: the environment against a loop, plans against known optima, the state of the policy, arguments that are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from models import ACTIONS
from tensordict import TensorDict
from torch import nn

from aime_fast.control.actor_critic import Critic, policy_features, policy_width
from aime_fast.control.planner import FIELDS, PlanningPolicy, make_latent_environment, unpack
from aime_fast.imagination.frame import advance, initial_state, predict

SMALL = {"horizon": 3, "candidates": 8, "iterations": 2, "top_k": 3}


class NearGoal(nn.Module):
    """Minus the squared distance of a position, the first number of h, from 1: as outcome heads, and as a critic."""

    def expected(self, hidden, latents):
        return self.value(hidden), torch.ones_like(hidden[..., 0])

    def value(self, features):
        return -(features[..., 0] - 1).square()


class Nothing(NearGoal):
    """No action earns anything."""

    def expected(self, hidden, latents):
        return torch.zeros_like(hidden[..., 0]), torch.ones_like(hidden[..., 0])


def slider(model, lag: bool):
    """A model whose lstm is a position in all places, which half the sum of an action moves; h is the position after it, or before."""
    model = copy.deepcopy(model)

    def slide(x, start, lstm):
        moved = lstm + 0.5 * x[:, 0, -ACTIONS:].sum(-1)[:, None, None, None]
        return (lstm if lag else moved)[:, :, 0], moved[:, None]

    model.recurrence.forward = slide
    return model


@pytest.fixture(scope="module")
def critic(model):
    torch.manual_seed(0)
    critic = Critic(policy_width(model), 16).double().requires_grad_(False)
    critic.layers[-1].weight.mul_(100)
    return critic


def frames(model, shape: tuple[int, ...], init: list[bool], seed: int) -> TensorDict:
    """What an environment gives a policy."""
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (*shape, model.image_size, model.image_size, 3), dtype=torch.uint8)
    return TensorDict({"pixels": pixels, "is_init": torch.tensor(init).reshape(*shape, 1)}, shape)


@pytest.mark.parametrize("valued", [False, True])
@torch.no_grad()
def test_a_roll_out_equals_a_loop_over_frames(model, critic, valued):
    discount, horizon = 0.9, 4
    torch.manual_seed(0)
    environment = make_latent_environment(model, critic if valued else None, discount)
    start = environment.reset(TensorDict(batch_size=[2, 3])).select(*FIELDS, "weight")
    start.update(start.select(*FIELDS).apply(lambda x: x + 0.3 * torch.randn_like(x)))
    actions = 2 * torch.rand(horizon, 2, 3, model.action_dim, dtype=torch.float64) - 1
    out = environment.rollout(horizon, actions=actions, auto_reset=False, tensordict=start.clone(), break_when_any_done=False)
    assert out.shape == (2, 3, horizon)
    assert not out["next", "done"].any()

    state, weight, returns = unpack(start.reshape(-1)), 1.0, 0.0
    for t, action in enumerate(actions.flatten(1, 2)):
        acted = advance(model, state, action)
        reward, continues = model.outcomes.expected(acted.hidden, acted.latents)
        _, state = predict(model, acted)
        returns, weight = returns + weight * reward, weight * discount * continues
        for name in FIELDS:
            torch.testing.assert_close(out["next", name][:, :, t].flatten(0, 1), getattr(state, name))
    if valued:
        value = critic.value(policy_features(state))
        assert value.abs().min() > 1e-3
        returns = returns + weight * value
    torch.testing.assert_close(out["next", "reward"].sum(-2).flatten(), returns)


@pytest.mark.parametrize("planner", ["cem", "mppi"])
@pytest.mark.parametrize(
    ("horizon", "lag", "earns", "critic"),
    [(1, False, NearGoal(), None), (2, True, NearGoal(), None), (1, False, Nothing(), NearGoal())],
    ids=["reward", "later reward", "value"],
)
def test_plans_find_the_optimum(model, planner, horizon, lag, earns, critic):
    """From three positions at once: as far as the goal, and no farther than an action reaches."""
    world = slider(model, lag)
    world.outcomes = earns
    torch.manual_seed(0)
    policy = PlanningPolicy(world, critic, planner, horizon, candidates=256, iterations=8, top_k=24, discount=1.0, temperature=20.0)
    positions = torch.tensor([1.6, 0.2, -3.0]).double()
    state = initial_state(model, 3)
    state = state._replace(lstm=state.lstm + positions[:, None, None, None], hidden=state.hidden + positions[:, None])
    action = policy.choose(state)
    torch.testing.assert_close(action.sum(-1), torch.tensor([-1.2, 1.6, 2.0]).double(), atol=0.15, rtol=0)
    assert (action.abs() <= 1).all()


@pytest.mark.parametrize("planner", ["cem", "mppi"])
def test_the_state_is_emptied_where_an_episode_begins(model, critic, planner):
    policy, other = (PlanningPolicy(model, critic, planner, **SMALL) for _ in range(2))
    for t in range(2):
        out = policy(frames(model, (2,), [t == 0] * 2, seed=t))
    assert out["action"].shape == (2, model.action_dim)
    assert out["action"].dtype == torch.float32
    assert out["action"].abs().max() <= 1
    before = policy.state

    policy(frames(model, (2,), [True, False], seed=2))
    continued = policy.state
    other(frames(model, (2,), [True, True], seed=2))
    torch.testing.assert_close(continued.delta[0], torch.zeros_like(continued.delta[0]))
    torch.testing.assert_close(continued.delta[1], continued.latents[1] - before.latents[1])
    for name in ("latents", "delta", "context"):
        torch.testing.assert_close(getattr(continued, name)[0], getattr(other.state, name)[0])

    torch.manual_seed(3)
    again = policy(frames(model, (2,), [True, True], seed=2))["action"]
    first = PlanningPolicy(model, critic, planner, **SMALL)(frames(model, (2,), [True, True], seed=2))["action"]
    torch.testing.assert_close(again, first)


def test_a_single_environment_has_no_batch(model):
    action = PlanningPolicy(model, **SMALL)(frames(model, (), [True], seed=0))["action"]
    assert action.shape == (model.action_dim,)


@pytest.mark.parametrize(
    "bad",
    [
        {"planner": "random"}, {"horizon": 0}, {"iterations": 0}, {"top_k": 1}, {"top_k": 65}, {"discount": 0.0}, {"discount": 1.1},
        {"temperature": 0.0},
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(model, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PlanningPolicy(model, **bad)


def test_the_environment_meets_its_specs(model):
    from torchrl.envs.utils import check_env_specs

    environment = make_latent_environment(model)
    with torch.no_grad():
        check_env_specs(environment, seed=None)
