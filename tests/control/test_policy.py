from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from aime_fast.config import preset
from aime_fast.control.actor_critic import Actor, policy_features, policy_width
from aime_fast.control.policy import WorldModelPolicy
from aime_fast.data.collectors import play_episodes
from aime_fast.data.dataset import to_tensordict
from aime_fast.imagination.sequence import infer_latents
from aime_fast.training.behaviour import states_of
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = DPGMMVariationalRecurrentAutoencoder.from_config(preset("debug"), 1).eval().requires_grad_(False)
    return WorldModelPolicy(model, Actor(policy_width(model), 16, 1).requires_grad_(False), sample=False)


@torch.no_grad()
def test_in_a_collector_it_sees_the_state_that_the_recorded_episode_gives(policy):
    """Action by action: its inputs are those inferred, in parallel, from the frames and actions that were recorded."""
    config = dataclasses.replace(preset("debug").data, frame_skip=50)
    seen, act = [], policy.actor.forward

    def record(features, sample=True):
        seen.append(features)
        return act(features, sample)

    policy.actor.forward = record
    episodes = play_episodes(config, lambda: policy, 0)
    recorded = [to_tensordict(next(episodes)) for _ in range(2)]
    episodes.close()
    policy.actor.forward = act
    del seen[0]  # the collector tries a policy once when it is made
    for number, episode in enumerate(recorded):
        length = len(episode)
        brought = (episode[name].T for name in ("reward", "discount"))
        pieces = infer_latents(policy.model, episode["pixels"][None], episode["action"][None], *brought)
        expected = policy_features(states_of(policy.model, pieces, slice(None)))
        found = torch.cat(seen[number * length : (number + 1) * length])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (found[0, : policy.model.recurrence.hidden_dim] == 0).all()
        torch.testing.assert_close(episode["action"], act(found, sample=False)[0])


@torch.no_grad()
def test_environments_side_by_side_do_not_see_each_other(policy):
    def frames(seed, init):
        pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        return TensorDict({"pixels": pixels, "is_init": torch.tensor([init])})

    def play(*streams):
        policy.state = None
        return [policy(torch.stack(at_once))["action"] for at_once in zip(*streams)]

    one = [frames(seed, seed == 0) for seed in range(4)]
    other = [frames(10 + seed, seed in (0, 2)) for seed in range(4)]  # begins anew in the middle
    together = play(one, other)
    torch.testing.assert_close(torch.stack(together)[:, :1], torch.stack(play(one)))
    torch.testing.assert_close(torch.stack(together)[2:, 1:], torch.stack(play(other[2:])))


def test_a_single_environment_needs_no_batch_axis(policy):
    policy.state = None
    out = policy(TensorDict({"pixels": torch.zeros(32, 32, 3, dtype=torch.uint8), "is_init": torch.tensor([True])}))
    assert out["action"].shape == (1,)
    assert out["action"].dtype == torch.float32
