from collections.abc import Callable
from pathlib import Path

import pytest
from recordings import ATTRIBUTES, random_episode

from aime_fast.data import EpisodeWriter


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
