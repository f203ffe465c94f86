"""Collection from the real simulator, by the command that a user types."""

import dataclasses
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command, process
from recordings import ATTRIBUTES
from tensordict import TensorDict

from aime_fast.collect import main
from aime_fast.config import DataConfig
from aime_fast.data import DMCVBDataset, EpisodeWriter, collect
from aime_fast.data.collectors import Shard
from aime_fast.data.environments import RenderedTask, episode_seeds, probe_renderer
from aime_fast.data.noise import NoisePolicy
from aime_fast.errors import ConfigError, DataError


def run(folder: Path, *arguments: str, start=command) -> subprocess.CompletedProcess:
    return start("collect", "--tier", "debug", *arguments, cwd=folder)


def test_one_worker_records_the_frames_that_a_replay_of_its_actions_renders(tmp_path):
    done = run(tmp_path, "--episodes", "2", "--seed", "3", "--frame-skip", "40", "--out", "sub/a.h5", start=process)
    assert done.returncode == 0, done.stderr
    assert "sub/a.h5: 2 episodes, 50 frames" in done.stdout
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["a.h5"]

    data = DMCVBDataset(tmp_path / "sub/a.h5", 5, domain="cartpole", task="swingup", image_size=32, frame_skip=40, render_quality="fast")
    assert {key: data.attributes[key] for key in ("seed", "policy", "action_dim")} == {"seed": 3, "policy": "ou", "action_dim": 1}
    assert {"dm_control", "mujoco", "torchrl"} <= set(data.attributes["versions"])
    assert data.position_names == ("cart", "pole_1", "pole_1/tip")

    config = DataConfig(frame_skip=40, image_size=32)
    task = RenderedTask(config, 0)
    for index in range(2):
        episode = data.read_episode(index)
        task.seed(episode_seeds(3, index)[0])
        pixels = task.reset()
        for t in range(25):
            seen = episode["pixels"][t].permute(1, 2, 0).numpy().astype(int)
            assert np.abs(seen - pixels).mean() < 0.5, f"episode {index}, frame {t} is not the picture before action {t}"
            np.testing.assert_allclose(episode["positions"][t], task.positions(), atol=1e-3)
            pixels, reward, discount, last = task.step(episode["action"][t].numpy())
            assert episode["reward"][t].item() == pytest.approx(reward, abs=1e-5)
            assert (episode["discount"][t].item(), last) == (discount, t == 24)
    assert np.abs(np.diff(data.read_episode(0)["pixels"].numpy().astype(int), axis=0)).mean() > 0.1, "nothing moves"
    task.close()

    before = (tmp_path / "sub/a.h5").read_bytes()
    refused = run(tmp_path, "--out", "sub/a.h5")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --out sub/a.h5: the file exists; pass --overwrite")
    assert (tmp_path / "sub/a.h5").read_bytes() == before


def test_episodes_of_another_task_are_different_ones(tmp_path):
    settings = ("--policy", "random", "--frame-skip", "20")
    done = run(tmp_path, "--domain", "reacher", "--task", "easy", "--workers", "1", "--episodes", "3", *settings)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "data/reacher-easy-seed0.h5"
    data = DMCVBDataset(path, 5, domain="reacher", task="easy", render_quality="fast")
    assert (data.num_episodes, data.action_dim, data.lengths) == (3, 2, [50, 50, 50])
    assert (data.attributes["policy"], data.attributes["render_backend"]) == ("random", os.environ.get("MUJOCO_GL") or "egl")
    actions = [data.read_episode(i)["action"] for i in range(3)]
    assert all(not torch.equal(actions[i], actions[j]) for i in range(3) for j in range(i))
    assert torch.cat(actions).std().item() == pytest.approx(3**-0.5, abs=0.07)  # of a uniform number in [-1, 1]


def test_episodes_are_the_same_whatever_workers_and_shards(tmp_path):
    config = DataConfig(image_size=16, frame_skip=50, episodes=5, workers=1, policy="mixed")
    alone = DMCVBDataset(collect(config, 4, tmp_path / "alone.h5", progress=False), 5)
    two = DMCVBDataset(collect(dataclasses.replace(config, workers=2), 4, tmp_path / "two.h5", progress=False), 5)
    assert two.identities == alone.identities
    assert len(set(two.identities)) == 5
    for index in (1, 2, 3):
        collect(config, 4, tmp_path / "shards" / f"{index}.h5", progress=False, shard=Shard(index, 3))
    shards = DMCVBDataset(tmp_path / "shards", 5)
    assert shards.identities == [alone.identities[number] for number in (0, 3, 1, 4, 2)]
    assert alone.attributes.keys() == shards.attributes.keys() - {"shard"}
    with pytest.raises(DataError, match="--shard 6/6: of --episodes 5 none are left for it; give fewer shards"):
        collect(config, 4, tmp_path / "none.h5", progress=False, shard=Shard(6, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--domain", "walker", "--task", "swim"), "error: --task swim: domain walker has no such task; choose one of stand, walk, run"),
        (("--tier", "7"), "error: --tier 7: there is no such tier; choose one of 1, 2, 3, debug"),
        (("--policy", "expert"), "--policy"),
        (("--shard", "0/3"), "error: --shard 0/3: expected I/N with 1 <= I <= N"),
        (("--backend", "slurm-array"), "error: --backend slurm-array: SLURM_ARRAY_TASK_ID is not set; submit it with sbatch --array"),
        (("--backend", "slurm-array", "--shard", "2/3"), "error: --shard 2/3 --backend slurm-array: the array says which shard this is"),
    ],
)
def test_bad_arguments_give_one_message_and_status_2(tmp_path, arguments, message):
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.h5*")) == []


def test_a_part_of_an_array_is_no_shard(monkeypatch):
    for name, value in {"ID": 7, "MIN": 7, "MAX": 12, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(ConfigError, match="the array's 2 tasks are numbered 7 to 12, expected 1 to N, all of them"):
        main(["--backend", "slurm-array"])


def test_unusable_settings(tmp_path):
    with pytest.raises(DataError, match="--domain unicycle: dm_control has no such domain; choose one of acrobot, "):
        RenderedTask(DataConfig(domain="unicycle"), 0)
    with pytest.raises(DataError, match="--domain lqr --task lqr_2_1: its actions have no bounds"):
        RenderedTask(DataConfig(domain="lqr", task="lqr_2_1"), 0)
    with pytest.raises(ConfigError, match=r"--workers 0: expected an integer in \[1, 256\]"):
        collect(DataConfig(workers=0), 0, tmp_path / "x.h5")
    with pytest.raises(ConfigError, match=r"--image-size 1000000: expected an integer in \[8, 1024\]"):
        collect(DataConfig(image_size=10**6), 0, tmp_path / "x.h5")
    for seed in (-1, 2**32, 10**30):  # HDF5 stores no integer of more than 64 bits
        with pytest.raises(ConfigError, match=rf"--seed {seed}: expected an integer in \[0, 4"):
            collect(DataConfig(), seed, tmp_path / "x.h5")
    with pytest.raises(DataError, match="this is a folder"):
        EpisodeWriter(tmp_path, ATTRIBUTES)


def test_the_probe_names_the_packages_to_install(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "crayon")
    with pytest.raises(DataError, match=r"crayon: RuntimeError.*unset MUJOCO_GL.*libegl1 libgl1"):
        probe_renderer()
    monkeypatch.delenv("MUJOCO_GL")
    with pytest.raises(DataError, match=r"egl: no frame within 0.01 s; osmesa: no frame within 0.01 s.*libegl1 libgl1"):
        probe_renderer(timeout=0.01)


@pytest.mark.parametrize(("domain", "task", "quality"), [("cartpole", "swingup", "full"), ("humanoid", "walk", "fast")])
def test_render_qualities_show_the_same_scene(domain, task, quality):
    config = DataConfig(domain=domain, task=task, image_size=48, render_quality=quality)
    other = DataConfig(domain=domain, task=task, image_size=48, render_quality="fast" if quality == "full" else "full")
    pictures = [RenderedTask(c, 0).reset().astype(int) for c in (config, other)]
    assert pictures[0].shape == (48, 48, 3)
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 20


def test_a_camera_by_number_or_name():
    config = DataConfig(domain="walker", task="walk", image_size=32)
    task = lambda camera: RenderedTask(dataclasses.replace(config, camera=camera), 0)  # noqa: E731
    side, back, named, free = (task(camera).reset().astype(int) for camera in ("0", "1", "back", "-1"))
    assert np.array_equal(back, named)
    assert all(np.abs(side - other).mean() > 5 for other in (back, free))
    with pytest.raises(DataError, match=r"--camera front: walker walk has no such camera; choose one of -1, 0 \(side\), 1 \(back\)"):
        task("front")


def play(policy: NoisePolicy, first: bool) -> np.ndarray:
    return policy(TensorDict({"is_init": torch.tensor([first])}))["action"].numpy()


def test_the_ou_process_restarts_with_the_episode():
    policy = NoisePolicy("ou", 2, seed=0)
    walk = np.stack([play(policy, False) for _ in range(4000)])
    restarts = np.stack([play(policy, True) for _ in range(4000)])
    assert np.abs(walk).max() <= 1
    lagged = lambda x: np.corrcoef(x[1:, 0], x[:-1, 0])[0, 1]  # noqa: E731
    assert lagged(walk) == pytest.approx(np.exp(-policy.rate), abs=0.05)
    assert lagged(restarts) == pytest.approx(0, abs=0.05)


def test_projected_positions_are_on_the_drawn_geoms():
    task = RenderedTask(DataConfig(image_size=128, frame_skip=8), 0)
    task.reset()
    policy = NoisePolicy("swing", 1, seed=1)
    angles = []
    for t in range(60):
        task.step(play(policy, t == 0))
        drawn = task._camera.render(segmentation=True)[..., 0]  # [H, W], the geom behind each pixel
        for name, (column, row) in zip(task.position_names, task.positions().round().astype(int)):
            if 0 <= column < 128 and 0 <= row < 128:
                geom = task._env.physics.model.name2id(name.removesuffix("/tip"), "geom")
                assert drawn[row, column] == geom, f"frame {t}: {name} at column {column}, row {row}"
        (_, hinge), _, (_, tip) = task.positions()
        angles.append(tip - hinge)
    assert max(angles) - min(angles) > 20, "the pole hangs still: the projection is tested at one angle only"
    task.close()


def test_the_swing_policy_swings_the_pole_up_and_is_reproducible():
    heights, actions = [], []
    for seed in (3, 3):
        task, policy = RenderedTask(DataConfig(image_size=32, frame_skip=8), seed), NoisePolicy("swing", 1, seed)
        for _ in range(3):
            task.reset()
            for t in range(100):
                actions.append(play(policy, t == 0))
                task.step(actions[-1])
                (_, cart), _, (_, tip) = task.positions()
                heights.append(cart - tip)
        task.close()
    assert max(heights) > 0, "the pole was never above the horizontal"
    assert heights[:300] == heights[300:]
    assert np.array_equal(actions[:300], actions[300:])
    episodes = np.array(actions[:300])[:, 0].reshape(3, 100)
    assert np.abs(np.corrcoef(episodes)[np.triu_indices(3, 1)]).max() < 0.9, "all episodes have the same swing"


def test_the_mixed_policy_plays_whole_episodes_of_both_kinds():
    policy = NoisePolicy("mixed", 1, seed=0)
    episodes = np.array([[play(policy, t == 0)[0] for t in range(40)] for _ in range(60)])
    steps = np.abs(np.diff(episodes)).mean(1)  # 2/3 between independent uniform actions; a sinusoid of period >= 20 moves little
    swings = steps < 0.4
    assert 20 < swings.sum() < 40
    assert steps[swings].max() < 0.3
    assert steps[~swings].min() > 0.45
