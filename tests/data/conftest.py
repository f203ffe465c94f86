from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recordings import ATTRIBUTES, random_episode

from aime_fast.config import DataConfig
from aime_fast.data import DMCVBDataset, EpisodeWriter, collect


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    """Writes a shard of random episodes with these lengths and changed attributes; returns its path."""

    def write(lengths: tuple[int, ...] = (23, 40, 17), name: str = "good.h5", **changed: object) -> Path:
        attributes = {**ATTRIBUTES, **changed}
        with EpisodeWriter(tmp_path / name, attributes) as writer:
            for seed, frames in enumerate(lengths):
                writer.write(random_episode(frames, seed, attributes["image_size"], attributes["action_dim"]))
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def episodes(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    """Real episodes: an action is that taken after the picture of its row."""
    settings = DataConfig(image_size=16, frame_skip=50, episodes=3, workers=1, policy="random")
    data = DMCVBDataset(collect(settings, 0, tmp_path_factory.mktemp("recording") / "a.h5", progress=False), 1)
    found = [data.read_episode(i) for i in range(3)]
    assert found[0]["action"].std() > 0.3
    return [
        {
            "pixels": e["pixels"].permute(0, 2, 3, 1).numpy(), "action": e["action"].numpy(), "reward": e["reward"].numpy()[:, 0],
            "discount": e["discount"].numpy()[:, 0],
        }
        for e in found
    ]  # fmt: skip
