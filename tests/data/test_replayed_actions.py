"""Recorded actions, given to dm_control alone, lead through the recorded positions and rewards bit by bit."""

import dataclasses

import numpy as np
import pytest

from aime_fast.config import DataConfig
from aime_fast.data import DMCVBDataset, collect
from aime_fast.data.environments import RenderedTask, episode_seeds, moving_points

CARTPOLE = DataConfig(image_size=16, frame_skip=40, episodes=2, workers=1, policy="random")
UNIT = [CARTPOLE, dataclasses.replace(CARTPOLE, domain="reacher", task="easy", frame_skip=25, policy="ou")]
RESCALED = dataclasses.replace(CARTPOLE, domain="quadruped", task="walk", frame_skip=50, episodes=1, policy="ou")


@pytest.mark.parametrize("config", [*UNIT, RESCALED], ids=lambda config: config.domain)
def test_a_replay_in_plain_dm_control_is_bit_equal(tmp_path, config):
    data = DMCVBDataset(collect(config, 5, tmp_path / "a.h5", progress=False), 1)
    from dm_control import suite  # after a renderer is selected
    from dm_control.mujoco import engine

    env = suite.load(config.domain, config.task, task_kwargs={"random": 0})
    spec, physics = env.action_spec(), env.physics
    _, geoms, offsets = moving_points(physics.model)
    camera = engine.Camera(physics, config.image_size, config.image_size, camera_id=0 if physics.model.ncam else -1)
    unit = (spec.minimum == -1) & (spec.maximum == 1)
    assert unit.all() == (config is not RESCALED)
    for index in range(config.episodes):
        env.task._random = np.random.RandomState(episode_seeds(5, index)[0])
        env.reset()
        episode = data.read_episode(index)
        assert len(episode) > 10
        for t, action in enumerate(episode["action"].numpy().astype(np.float64)):
            points = physics.data.geom_xpos[geoms] + np.einsum("nij,nj->ni", physics.data.geom_xmat[geoms].reshape(-1, 3, 3), offsets)
            column, row, depth = camera.matrix @ np.concatenate([points, np.ones((len(points), 1))], axis=1).T
            drawn = np.stack([column / depth, row / depth], axis=1).astype(np.float32)
            np.testing.assert_array_equal(episode["positions"][t], drawn, err_msg=f"episode {index}, frame {t}")
            action = np.where(unit, action, spec.minimum + (action + 1) * (spec.maximum - spec.minimum) / 2)
            reward = 0.0
            for _ in range(config.frame_skip):
                timestep = env.step(action)
                reward += timestep.reward
                if timestep.last():
                    break
            assert episode["reward"][t].item() == np.float32(reward), f"episode {index}, frame {t}"
        assert timestep.last()


def test_an_action_is_applied_as_it_is_recorded_however_small():
    task = RenderedTask(dataclasses.replace(RESCALED, image_size=8), 0)
    action = np.random.default_rng(0).uniform(-1, 1, task.action_dim).astype(np.float32)
    action[:4] = [1e-30, -1, 1, 0.1]  # 1e-30 + 1 - 1 is 0, also in float64
    applied = task.applied(action)
    assert applied.dtype == np.float64
    unit = (task._low == -1) & (task._high == 1)
    np.testing.assert_array_equal(applied[unit], action.astype(np.float64)[unit])
    np.testing.assert_array_equal(task.applied(np.ones(task.action_dim, np.float32)), task._high)
    np.testing.assert_array_equal(task.applied(np.full(task.action_dim, -3.0, np.float32)), task._low)
    task.close()
