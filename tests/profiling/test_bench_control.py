"""The peer as an agent and `profiling.bench control`: real but tiny."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from aime_fast.config import preset, to_dict
from profiling import bench, bench_control
from profiling.machine import describe
from profiling.peers.dreamer_v3_agent import DreamerV3Agent, DreamerV3AgentConfig, EpisodeReplay

TINY = dict(depth=2, belief_dim=16, blocks=2, hidden_dim=16, categoricals=4, classes=3, batch_size=2, sequence_length=6, horizon=3)
A, SIZE, T = 2, 32, 9


def episode(seed: int = 0) -> dict[str, np.ndarray]:
    """As `play_episodes` yields it."""
    random = np.random.default_rng(seed)
    return {
        "pixels": random.integers(0, 256, (T, SIZE, SIZE, 3), dtype=np.uint8),
        "action": random.uniform(-1, 1, (T, A)).astype(np.float32),
        "reward": random.uniform(0, 1, T).astype(np.float32),
    }


@pytest.fixture(scope="module")
def agent() -> DreamerV3Agent:
    return DreamerV3Agent(SIZE, A, seed=1, config=DreamerV3AgentConfig(**TINY))


@pytest.fixture
def replay() -> EpisodeReplay:
    made = EpisodeReplay(seed=0)
    made.add(episode())
    return made


def test_a_row_of_the_replay_holds_what_led_to_its_frame(replay):
    played, batch = episode(), replay.draw(8, 6)
    for row in batch:
        begin = next(t for t in range(T) if np.array_equal(played["pixels"][t], row["next", "pixels"][0].permute(1, 2, 0).numpy()))
        before = slice(begin, begin + 5)
        np.testing.assert_array_equal(row["action"][1:], played["action"][before])
        np.testing.assert_array_equal(row["next", "reward"][1:, 0], played["reward"][before])
        first = (played["action"][begin - 1], played["reward"][begin - 1]) if begin else (np.zeros(A), 0.0)
        np.testing.assert_array_equal(row["action"][0], first[0])
        assert row["next", "reward"][0].item() == first[1]
        assert row["is_init"][:, 0].tolist() == [True] + [False] * 5
    with pytest.raises(ValueError, match="no episode has 10 frames"):
        replay.draw(1, 10)


@pytest.mark.parametrize("reinforce", [True, False])
def test_an_update_moves_model_actor_and_critic_and_every_loss_is_finite(replay, reinforce):
    made = DreamerV3Agent(SIZE, A, config=DreamerV3AgentConfig(**TINY, warmup_steps=0, reinforce=reinforce))
    made.give_mean_frame(replay.mean_frame())
    before = {name: value.clone() for name, value in made.state_dict().items()}
    for _ in range(2):  # the heads begin at zero: what feeds them has no gradient in the first update
        losses = made.update(replay.draw(2, 6))
    assert {"loss_model_continue", "loss_actor", "loss_value", "loss_replay_value"} <= losses.keys()
    assert all(math.isfinite(value) for value in losses.values())
    same = [name for name, parameter in made.named_parameters() if torch.equal(before[name], parameter)]
    assert not same
    assert made.updates == 2


def frame(seed: int, first: bool, *shape: int) -> TensorDict:
    pixels = torch.randint(0, 256, (*shape, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return TensorDict({"pixels": pixels, "is_init": torch.full((*shape, 1), first)}, batch_size=shape)


def test_the_policy_remembers_until_an_episode_begins(agent):
    def act(policy, seed, first):
        torch.manual_seed(seed)
        return policy(frame(seed, first))["action"]

    policy = agent.policy(sample=False)
    act(policy, 0, True)
    remembering = act(policy, 1, False)
    fresh = act(agent.policy(sample=False), 1, True)
    assert fresh.shape == (A,)
    assert fresh.abs().max() <= 1
    assert not torch.equal(remembering, fresh)
    assert torch.equal(act(policy, 1, True), fresh)
    assert not torch.equal(act(agent.policy(), 1, True), fresh), "it samples"
    assert policy(frame(0, True, 3))["action"].shape == (3, A)


def test_the_peer_trains_in_the_simulator(tmp_path):
    base = preset("debug")
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, frame_skip=50),
        control=dataclasses.replace(base.control, environment_frames=5000, seed_episodes=3),
    )
    sizes = DreamerV3AgentConfig(**TINY, train_ratio=1.0)
    policy, found = bench_control.train_peer(sizes, config, 100.0, tmp_path)
    assert not policy.sample
    assert found["cost"].pop("seconds") > 0
    assert found["cost"] == {"environment_frames": 5000, "updates": 9}  # 100 agent steps, 12 frames an update
    assert [point["environment_frames"] for point in found["curve"]] == [1000, 2000, 3000, 4000, 5000]
    assert ["losses" in point for point in found["curve"]] == [False, False, True, True, True]
    assert found["curve"][3]["seconds"] > found["curve"][2]["seconds"]


def contestant(score: float) -> dict:
    curve = [{"seconds": 60.0 * i, "environment_frames": 1000 * i, "return": score * i / 4} for i in range(1, 5)]
    cost = {"seconds": 300.0, "environment_frames": 4000, "updates": 7, "parameters": 2_000_000}
    return {"score": {"mean": score, "standard_error": 1.5, "minimum": score - 2, "episodes": 10}, "cost": cost, "curve": curve}


def test_results_of_seeds_become_a_table_curves_and_json(tmp_path):
    head = describe("cpu") | {"config": to_dict(preset(1)), "budget": 5.0, "threads": 1}
    head["versions"]["torchrl"] = "0.14"
    results = [{"seed": seed, "contestants": {"ours": contestant(100 + seed), "dreamer_v3": contestant(50)}} for seed in (0, 4)]
    bench_control.write(tmp_path, head, results)
    text = (tmp_path / "control.md").read_text()
    assert "cartpole swingup, frame skip 4, 64 pixels; 5 processor minutes for each agent and seed, seeds 0 4; CPU, 1 threads" in text
    assert "| measure | ours | dreamer_v3 |" in text
    assert "| return without noise, mean of 10 episodes | 102 (100 to 104) | 50 (50 to 50) |" in text
    assert "| return in training, last tenth of the frames | 102 (100 to 104) | 50 (50 to 50) |" in text
    found = json.loads((tmp_path / "control.json").read_text())
    assert found["table"]["processor minutes"]["ours"]["mean"] == 5
    assert [result["seed"] for result in found["seeds"]] == [0, 4]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_wrong_options_are_named(tmp_path, capsys):
    for options, message in {
        "--budget 0": "--budget 0: expected more than 0",
        '--budget 1 --peer-config {"width":1}': "--peer-config",
    }.items():
        with pytest.raises(SystemExit):
            bench.main(["control", *options.split(), "--out", str(tmp_path)])
        assert message in capsys.readouterr().err
