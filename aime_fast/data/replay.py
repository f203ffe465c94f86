"""The replay: episodes unpacked to uint8 frames, on the device or in a memory map, and batches gathered from it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from aime_fast.data.memory_map import Layout, map_frames
from aime_fast.data.prefetch import CopyStream
from aime_fast.errors import DataError
from aime_fast.runtime import ranks

KEYS = ("pixels", "action", "reward", "discount", "is_init")
DEVICE_SHARE = 0.25  # largest share of free device memory that "auto" gives to a replay; model and step need the rest


class EpisodeSource(Protocol):
    """Episodes to fill a replay with: `DMCVBDataset` or `SyntheticEpisodes`. `lengths` are in frames, `identities` are short
    checksums of their content, each a name that an episode keeps in every file and order."""

    num_episodes: int
    lengths: list[int]
    identities: list[str]
    action_dim: int
    image_size: int

    def read_episode(self, index: int) -> TensorDict: ...

    def close(self) -> None: ...


def replay_bytes(frames: int, image_size: int, action_dim: int) -> int:
    """Bytes of `frames` unpacked frames: uint8 pixels, float32 actions, rewards and discounts, and a one-byte flag."""
    return frames * (3 * image_size**2 + 4 * action_dim + 4 + 4 + 1)


def replay_on_device(choice: Literal["auto", "device", "host"], needed: int, free: int | None) -> bool:
    """Whether the frames are stored on the device, or else in a memory map on the host.

    "auto" takes the device if the frames need at most `DEVICE_SHARE` of its free memory, "device" if they fit at all. On a CPU the
    step reads the memory map directly, so every choice means the host.

    Args:
        choice: `--replay`.
        needed: bytes of all frames, of training and validation together.
        free: free bytes of the GPU before the model is built; None on a CPU.
    Raises:
        DataError: the choice is "device" and the frames do not fit.
    """
    if free is None or choice == "host":
        return False
    if choice == "device" and needed > free:
        raise DataError(
            f"--replay device: the unpacked episodes need {needed / 2**30:.1f} GiB, the device has {free / 2**30:.1f} GiB free; "
            f"pass --replay host, or use fewer episodes"
        )
    return choice == "device" or needed <= DEVICE_SHARE * free


class Replay:
    """All frames of a list of episodes, end to end, and batches gathered from them.

    A batch is made in two steps, so that a thread can run the first ahead: `prepare` and `deliver`.
    * Resident: `prepare` returns the rows; `deliver` copies them from pinned memory and gathers on the device, on the current stream.
    * Memory map, batches on a CPU: `prepare` gathers the batch; `deliver` returns it.
    * Memory map, batches on a GPU: `prepare` gathers into pinned memory and starts the copy on a separate stream; `deliver` makes
      the current stream wait for the copy, never the host. Prepared batches take device memory.

    Args:
        source: holds the episodes.
        episodes: indices of the episodes to unpack.
        offsets: row of each episode's first frame, then the number of all frames.
        device: of the batches.
        resident: store the frames on `device`; on a CPU that is ordinary memory.
        together: all processes of the run make this replay now: one of each machine unpacks the memory map of all of them.
    Attributes:
        frames: TensorDict [N] with `pixels` uint8 [N, 3, H, W], `action` float32 [N, A], `reward`, `discount` float32 [N, 1], `is_init`
            bool [N, 1].
        resident: as passed.
    Raises:
        DataError: an episode is damaged, or the disk is too small for the memory map. RankError: so it is in another process.
    """

    def __init__(
        self, source: EpisodeSource, episodes: list[int], offsets: list[int], device: torch.device, resident: bool, together: bool = False
    ):
        self.resident = resident
        self._stream = CopyStream(device) if device.type == "cuda" and not resident else None
        layout, count = _layout(source), offsets[-1]
        fill = partial(_fill, source=source, episodes=episodes, offsets=offsets)
        if not resident:
            self.frames = map_frames(layout, count, fill, together)
            return
        with ranks.failing_together() if together else nullcontext():
            self.frames = fill(_allocate(layout, count, device))

    def prepare(self, rows: Tensor) -> Any:
        """The part of a batch that any thread can do ahead. `rows`: int64 of any shape, on the host."""
        if self.resident:
            return rows
        batch = gather(self.frames, rows, pin=self._stream is not None)
        return batch if self._stream is None else self._stream.send(batch)

    def deliver(self, prepared: Any) -> TensorDict:
        """The batch of a `prepare`: TensorDict of the rows' shape on the device, for use on the current stream."""
        if self.resident:
            return gather(self.frames, prepared)
        return prepared if self._stream is None else self._stream.receive(prepared)


def gather(frames: TensorDict, rows: Tensor, pin: bool = False) -> TensorDict:
    """Frames `rows` int64 [B, T] as a batch [B, T] on the device of `frames`; on a CPU in pinned memory if `pin`."""
    device = frames["pixels"].device
    index = rows.flatten()
    if device.type == "cuda":
        index = index.pin_memory().to(device, non_blocking=True)
    batch = {}
    for key in KEYS:
        values = frames[key]
        out = torch.empty(rows.numel(), *values.shape[1:], dtype=values.dtype, device=device, pin_memory=pin)
        batch[key] = torch.index_select(values, 0, index, out=out).view(*rows.shape, *values.shape[1:])
    return TensorDict(batch, batch_size=rows.shape, device=device)


def _allocate(layout: Layout, count: int, device: torch.device) -> TensorDict:
    """Room for frames in device memory."""
    tensors = {key: torch.empty(count, *shape, dtype=dtype, device=device) for key, (shape, dtype) in layout.items()}
    return TensorDict(tensors, batch_size=[count])


def _layout(source: EpisodeSource) -> Layout:
    """Shape and dtype of each entry of one frame."""
    return {
        "pixels": ((3, source.image_size, source.image_size), torch.uint8),
        "action": ((source.action_dim,), torch.float32),
        "reward": ((1,), torch.float32),
        "discount": ((1,), torch.float32),
        "is_init": ((1,), torch.bool),
    }


def _fill(frames: TensorDict, source: EpisodeSource, episodes: list[int], offsets: list[int]) -> TensorDict:
    for index, begin, end in zip(episodes, offsets[:-1], offsets[1:]):
        episode = source.read_episode(index)
        for key in KEYS:
            frames[key][begin:end] = episode[key]
    return frames
