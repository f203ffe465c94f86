"""The replay: episodes unpacked into a memory map, and batches gathered from it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from aime_fast.data.episodes import DataError

KEYS = ("pixels", "action", "reward", "is_init")


class EpisodeSource(Protocol):
    """What a replay is filled from: `DMCVBDataset` or `SyntheticEpisodes`."""

    num_episodes: int
    lengths: list[int]
    action_dim: int
    image_size: int

    def read_episode(self, index: int) -> TensorDict: ...

    def close(self) -> None: ...


def fill_replay(source: EpisodeSource, episodes: list[int], offsets: list[int]) -> TensorDict:
    """A memory-mapped TensorDict [frames of all episodes].

    Its files are deleted as soon as they are mapped: the space stays ours while the process lives, and is free after it however
    it ends.
    """
    frames, size = offsets[-1], source.image_size
    folder = Path(tempfile.mkdtemp(prefix="aime_fast-"))
    try:
        needed, free = frames * (3 * size * size + 4 * source.action_dim + 5), shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(
                f"{folder}: the unpacked episodes need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
                f"set TMPDIR to a folder on a larger disk"
            )
        shapes = {
            "pixels": ((3, size, size), torch.uint8),
            "action": ((source.action_dim,), torch.float32),
            "reward": ((1,), torch.float32),
            "is_init": ((1,), torch.bool),
        }
        replay = TensorDict(
            {
                key: MemoryMappedTensor.empty((frames, *shape), dtype=dtype, filename=folder / f"{key}.memmap")
                for key, (shape, dtype) in shapes.items()
            },
            batch_size=[frames],
        )
        for index, begin, end in zip(episodes, offsets[:-1], offsets[1:]):
            episode = source.read_episode(index)
            for key in KEYS:
                replay[key][begin:end] = episode[key]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return replay


def plain(mapped: Tensor) -> Tensor:
    return mapped.as_subclass(torch.Tensor)


def gather(replay: TensorDict, rows: Tensor, pin: bool) -> TensorDict:
    """Frames `rows` int64 [B, T] of the replay as a batch [B, T] in ordinary, or pinned, memory."""
    batch = {}
    for key in KEYS:
        frames = plain(replay[key])
        out = torch.empty(rows.numel(), *frames.shape[1:], dtype=frames.dtype, pin_memory=pin)
        batch[key] = torch.index_select(frames, 0, rows.flatten(), out=out).view(*rows.shape, *frames.shape[1:])
    return TensorDict(batch, batch_size=rows.shape, device="cpu")
