"""Shared by the data tests: small settings, random episodes, the attributes of their file, and equality of batches."""

from pathlib import Path

import h5py
import numpy as np
import torch
from tensordict import TensorDict

from aime_fast.config import DataConfig
from aime_fast.data.checksums import episode_sha256
from aime_fast.data.episodes import DTYPES, FORMAT_VERSION, OPTIONAL, UNVERIFIED_VERSION, file_sha256, to_python
from aime_fast.data.replay import KEYS

SMALL = DataConfig(data="synthetic", episodes=6, image_size=16, sequence_length=7, batch_size=4, validation_fraction=0.3)
ATTRIBUTES = {
    "domain": "cartpole",
    "task": "swingup",
    "frame_skip": 4,
    "image_size": 8,
    "render_quality": "fast",
    "action_dim": 2,
    "seed": 0,
    "versions": "{}",
}


def random_episode(frames: int, seed: int = 0, image_size: int = 8, action_dim: int = 2) -> dict[str, np.ndarray]:
    random = np.random.default_rng([seed, frames])
    return {
        "pixels": random.integers(0, 256, (frames, image_size, image_size, 3), dtype=np.uint8),
        "action": random.uniform(-1, 1, (frames, action_dim)).astype(np.float32),
        "reward": random.standard_normal(frames).astype(np.float32),
        "discount": np.ones(frames, dtype=np.float32),
        "is_init": np.arange(frames) == 0,
    }


def seal(path: Path) -> None:
    """Give a changed file the checksums of its present content, so that a test meets what is checked besides them."""
    with h5py.File(path, "r+") as file:
        for group in file.values():
            if isinstance(group, h5py.Group):
                arrays = {key: value[()] for key, value in group.items() if key in DTYPES | OPTIONAL}
                group.attrs["sha256"] = np.bytes_(episode_sha256(arrays))
        attributes = {key: to_python(value) for key, value in file.attrs.items()}
        if attributes.get("format_version") == FORMAT_VERSION:
            file.attrs["attributes_sha256"] = file_sha256(file, path, attributes)


def unseal(path: Path) -> None:
    """Make a file one of format 1, without checksums over content and attributes."""
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = UNVERIFIED_VERSION
        del file.attrs["attributes_sha256"]
        for group in file.values():
            del group.attrs["sha256"]


def equal(a: TensorDict, b: TensorDict) -> bool:
    """Whether two batches have equal shapes, dtypes and values, on any device."""
    return a.shape == b.shape and all(a[key].dtype == b[key].dtype and torch.equal(a[key].cpu(), b[key].cpu()) for key in KEYS)
