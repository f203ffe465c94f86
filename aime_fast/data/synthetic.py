"""Episodes without a simulator: a disc pushed by the actions, and a square that ignores them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from tensordict import TensorDict

from aime_fast.data.checksums import identity
from aime_fast.data.dataset import to_tensordict

FRAMES = 100
ACTION_DIM = 2


class SyntheticEpisodes:
    """Episodes of 100 frames with two-dimensional actions; the same seed gives the same bytes.

    The action accelerates a bright disc, with friction and elastic walls, so a frame depends on all actions before it. A dark
    square moves on a circle at constant speed. The reward is high where the disc is near the centre. The interface is that of
    `DMCVBDataset`, without a file: `num_episodes`, `lengths`, `identities`, `action_dim`, `image_size`, `attributes`, `read_episode`,
    `close`. The identities depend on seed, index and image size only.
    """

    def __init__(self, num_episodes: int, image_size: int, seed: int):
        self.num_episodes, self.image_size, self.action_dim = num_episodes, image_size, ACTION_DIM
        self.lengths = [FRAMES] * num_episodes
        self.identities = [identity(hashlib.sha256(f"disc {seed} {i} {image_size}".encode()).hexdigest()) for i in range(num_episodes)]
        self.seed = seed
        self.attributes: dict[str, Any] = {"domain": "synthetic", "task": "disc", "seed": seed, "image_size": image_size}

    def read_episode(self, index: int) -> TensorDict:
        """Episode `index` as a TensorDict [100], laid out as in `DMCVBDataset`."""
        random = np.random.default_rng([self.seed, index])
        action = _smooth_noise(random)
        disc = _disc_path(action, random)  # [T, 2] in [-1, 1]
        angle = random.uniform(0, 2 * np.pi) + 0.12 * np.arange(FRAMES)
        square = 0.6 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        is_init = np.zeros(FRAMES, dtype=np.bool_)
        is_init[0] = True
        episode = {
            "pixels": _draw(disc, square, self.image_size),
            "action": action,
            "reward": np.exp(-4 * (disc**2).sum(1)).astype(np.float32),
            "discount": np.ones(FRAMES, dtype=np.float32),
            "is_init": is_init,
        }
        return to_tensordict(episode)

    def close(self) -> None:
        """Does nothing: there is no file to close."""


def _smooth_noise(random: np.random.Generator) -> np.ndarray:
    action = np.empty((FRAMES, ACTION_DIM))
    state = random.standard_normal(ACTION_DIM)
    for t in range(FRAMES):
        action[t] = state
        state = 0.8 * state + 0.6 * random.standard_normal(ACTION_DIM)
    return np.clip(0.7 * action, -1, 1).astype(np.float32)


def _disc_path(action: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Positions [T, 2] of the disc; row t is its place before action[t] takes effect."""
    wall = 0.75
    position, velocity = random.uniform(-0.5, 0.5, 2), np.zeros(2)
    path = np.empty((FRAMES, 2))
    for t in range(FRAMES):
        path[t] = position
        velocity = 0.8 * velocity + 0.06 * action[t]
        position = position + velocity
        outside = np.abs(position) > wall
        velocity = np.where(outside, -velocity, velocity)
        position = np.clip(position, -wall, wall)
    return path


def _draw(disc: np.ndarray, square: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, size, size, 3]: both shapes with edges one pixel soft, on a constant gradient."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = axis[None, None, :], axis[None, :, None]  # [1, 1, W], [1, H, 1]

    def cover(distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance * size / 2, 0, 1)[..., None]

    def centre(path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return path[:, 0].astype(np.float32)[:, None, None], path[:, 1].astype(np.float32)[:, None, None]

    dx, dy = centre(disc)
    sx, sy = centre(square)
    in_disc = cover(np.hypot(x - dx, y - dy) - 0.2)  # [T, H, W, 1]
    in_square = cover(np.maximum(np.abs(x - sx), np.abs(y - sy)) - 0.14)
    gradient = np.broadcast_to(np.stack([0.3 + 0.1 * x + 0 * y, 0.35 + 0 * x + 0.1 * y, 0.5 + 0 * x + 0 * y], axis=-1), (1, size, size, 3))
    frame = gradient * (1 - in_square) + np.array([0.1, 0.25, 0.15], dtype=np.float32) * in_square
    frame = frame * (1 - in_disc) + np.array([0.95, 0.75, 0.2], dtype=np.float32) * in_disc
    return np.round(frame * 255).astype(np.uint8)
