from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from models import make_batch, make_model
from torch import nn

from aime_fast.config import ControlConfig
from aime_fast.control.actor_critic import Actor, act, act_in_imagination, lambda_returns, policy_features, policy_width
from aime_fast.imagination.frame import State, initial_state, observe, step
from aime_fast.imagination.sequence import infer_latents
from aime_fast.training.behaviour import Behaviour, entropy_weight, states_of


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_lambda_returns_are_their_definition(decay):
    rewards, discounts, values = torch.rand(3, 5, 4, dtype=torch.float64)
    found = lambda_returns(rewards, discounts, values, decay)
    for n in range(4):
        after = values[4, n]
        for t in reversed(range(5)):  # R_t = r_t + d_t ((1 - decay) v_{t+1} + decay R_{t+1})
            after = rewards[t, n] + discounts[t, n] * ((1 - decay) * values[t, n] + decay * after)
            torch.testing.assert_close(found[t, n], after)


def test_lambda_returns_are_torchrls():
    from torchrl.objectives.value.functional import td_lambda_return_estimate

    rewards, values = torch.rand(2, 6, 3, dtype=torch.float64)
    found = lambda_returns(rewards, torch.full_like(rewards, 0.9), values, 0.8)
    flags = torch.zeros(3, 6, 1, dtype=torch.bool)
    flags[:, -1] = True  # the end of what was imagined, where the value stands for the rest
    theirs = td_lambda_return_estimate(0.9, 0.8, values.T.unsqueeze(-1), rewards.T.unsqueeze(-1), flags, torch.zeros_like(flags))
    torch.testing.assert_close(found, theirs.squeeze(-1).T)


def test_the_density_of_an_action_is_that_of_a_squashed_normal():
    from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

    torch.manual_seed(0)
    actor, features = Actor(7, 16, 2).double(), torch.randn(50, 7, dtype=torch.float64)
    action, log_prob = actor(features)
    mean, std = actor.distribution(features)
    squashed = TransformedDistribution(Independent(Normal(mean, std), 1), [TanhTransform()])
    torch.testing.assert_close(log_prob, squashed.log_prob(action), atol=1e-6, rtol=1e-6)
    assert (action.abs() < 1).all()
    assert torch.equal(actor(features, sample=False)[0], mean.tanh())


@torch.no_grad()
def test_imagined_behaviour_is_a_loop_of_imagine():
    """One frame at a time by the model's public method, with the actions that the actor chose."""
    model = make_model()
    torch.manual_seed(0)
    actor = Actor(policy_width(model), 16, model.action_dim).double()
    video, actions = make_batch(model, 3, 2)
    none = torch.zeros(3, dtype=torch.bool)
    _, before = step(model, video[:, 0], actions[:, 0], model.initial_state(3), ~none)
    seen = observe(model, video[:, 1], before, none)

    chosen = []

    class Recording(nn.Module):
        def forward(self, features):
            chosen.append(actor(features, sample=False)[0])
            return chosen[-1], torch.zeros(len(features), dtype=torch.float64)

    imagined = act_in_imagination(model, Recording(), seen, 4, sample=False)
    _, state = step(model, video[:, 1], chosen[0], before, none)
    torch.testing.assert_close(imagined.rewards[0], model.outcomes.expected(state.hidden, state.latents)[0])
    for t, action in enumerate(chosen[1:], 1):
        out, state = model.imagine(action, state)
        torch.testing.assert_close(imagined.rewards[t], out["rewards"])
        torch.testing.assert_close(imagined.continues[t], out["continues"])
        latents = imagined.features[t][:, model.recurrence.hidden_dim :][:, : model.latent_dim]
        torch.testing.assert_close(latents, out["latents"])


@torch.no_grad()
def test_states_of_pieces_are_those_that_observing_frame_by_frame_gives():
    model = make_model()
    video, actions = make_batch(model, 2, 6)
    pieces = infer_latents(model, video, actions, torch.zeros(2, 6), torch.ones(2, 6))
    found = policy_features(states_of(model, pieces, slice(None))).unflatten(0, (2, 6))
    later = policy_features(states_of(model, pieces, slice(2, None))).unflatten(0, (2, 4))
    torch.testing.assert_close(later, found[:, 2:])
    assert not states_of(model, pieces, slice(None)).fresh.any()  # else the movement of the next frame would not count
    state, none = model.initial_state(2), torch.zeros(2, dtype=torch.bool)
    for t in range(6):
        seen = observe(model, video[:, t], state, none if t else ~none)
        torch.testing.assert_close(found[:, t], policy_features(seen))
        _, state = step(model, video[:, t], actions[:, t], state, none if t else ~none)


def test_a_compiled_frame_acts_alike(model):
    model = copy.deepcopy(model).requires_grad_(False)
    actor = Actor(policy_width(model), 16, model.action_dim).double()
    actor.layers[-1].weight.data.normal_()
    found = []
    for act_once in (act, torch.compile(act, fullgraph=True, dynamic=False, backend="aot_eager")):
        torch.manual_seed(0)
        imagined = act_in_imagination(model, actor, initial_state(model, 3), 3, act_once=act_once)
        found.append((imagined, torch.autograd.grad(imagined.rewards.sum() + imagined.log_probs.sum(), list(actor.parameters()))))
    torch.testing.assert_close(*found)


class Corridor(nn.Module):
    """A world without pictures: z moves by the action, and the reward is highest where z is 0.5."""

    latent_dim, action_dim = 1, 1

    def __init__(self):
        super().__init__()
        self.recurrence = SimpleNamespace(hidden_dim=1)
        self.perceiver_io = SimpleNamespace(context_dim=1)
        self.decoder = SimpleNamespace(background=torch.zeros(1))

    @staticmethod
    def advance(model, state, action):
        return state._replace(hidden=action)

    @staticmethod
    def predict(model, state, sample=False):
        latents = state.latents + 0.2 * state.hidden
        return None, state._replace(latents=latents, delta=latents - state.latents)

    class outcomes:
        @staticmethod
        def expected(hidden, latents):
            return -((latents + 0.2 * hidden - 0.5) ** 2).squeeze(-1), torch.ones(hidden.shape[:-1])


def anywhere() -> State:
    latents, empty = torch.rand(64, 1) * 2 - 1, torch.zeros(64, 1)
    return State(None, empty, latents, empty, torch.zeros(64, dtype=torch.bool), empty, None, None)


def test_the_actor_finds_the_optimum_of_a_small_known_world(monkeypatch):
    for name in ("advance", "predict"):
        monkeypatch.setattr(f"aime_fast.control.actor_critic.{name}", getattr(Corridor, name))

    torch.manual_seed(0)
    control = dataclasses.replace(ControlConfig(), actor_lr=3e-3, critic_lr=3e-3, policy_dim=32, discount=0.9, imagination_horizon=8)
    learner = Behaviour(Corridor(), control)
    rewards = [learner.update(anywhere())["imagined_reward"].item() for _ in range(150)]
    assert sum(rewards[-20:]) / 20 > 0.5 * sum(rewards[:5]) / 5  # rewards are below 0
    for actor in (learner.actor, learner.average_actor.model):
        state, reward = anywhere(), None
        for _ in range(8):
            action, _ = actor(policy_features(state), sample=False)
            _, state = Corridor.predict(None, Corridor.advance(None, state, action))
            reward = -((state.latents - 0.5) ** 2).mean()
        assert reward > -0.005
    assert learner.faults.read().skipped == 0


def test_the_weight_of_the_entropy_falls_in_the_second_half():
    control = dataclasses.replace(ControlConfig(), actor_entropy=0.04, final_entropy=0.01)
    weights = [entropy_weight(control, share) for share in (0.0, 0.5, 0.75, 1.0)]
    assert weights == pytest.approx([0.04, 0.04, 0.02, 0.01])
    assert entropy_weight(dataclasses.replace(control, final_entropy=0.0), 1.0) == 0.0
    assert entropy_weight(dataclasses.replace(control, final_entropy=None), 1.0) == 0.04
    assert entropy_weight(dataclasses.replace(control, actor_entropy=0.0), 1.0) == 0.0


def test_a_calmed_actor_gives_up_its_entropy(monkeypatch):
    for name in ("advance", "predict"):
        monkeypatch.setattr(f"aime_fast.control.actor_critic.{name}", getattr(Corridor, name))
    control = dataclasses.replace(
        ControlConfig(), actor_lr=1e-2, policy_dim=32, imagination_horizon=4, actor_entropy=1.0, final_entropy=0.0
    )
    found = []
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        learner = Behaviour(Corridor(), control)
        learner.calm(share)
        found.append([learner.update(anywhere())["entropy"].item() for _ in range(60)][-1])
    assert found[0] > 0.3 + found[1]


def test_an_update_that_is_not_finite_changes_nothing():
    model = make_model().float().requires_grad_(False)
    learner = Behaviour(model, dataclasses.replace(ControlConfig(), policy_dim=16, imagination_horizon=2))
    video, actions = (x.float() for x in make_batch(model, 2, 10))
    pieces = infer_latents(model, video, actions, torch.zeros(2, 10), torch.ones(2, 10))
    start = states_of(model, pieces, slice(8, None))
    learner.update(start)
    before = copy.deepcopy(learner.state_dict())
    learner.update(start._replace(latents=torch.full_like(start.latents, torch.nan)))
    after = learner.state_dict()
    for name in ("actor", "critic", "average_actor", "average_critic"):
        assert all(torch.equal(value, before[name][part]) for part, value in after[name].items()), name
    assert torch.equal(after["range"], before["range"])
    assert all(map(torch.equal, after["averaged"], before["averaged"]))
    assert learner.faults.read().skipped == 1
