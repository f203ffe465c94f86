"""Training batches: episodes unpacked once into a replay of uint8 frames, sequences gathered from it ahead of the step.

HDF5 keeps data small; a memory map is twenty times faster to sample, and frames that lie on the GPU need not travel at all.
`make_batches` unpacks a data set, split by episode, into two `SequenceBatches`. Which frames batch n holds is a function of the
seed and of n alone (`windows.py`), wherever the frames lie, so resuming is counting.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from aime_fast.config import DataConfig
from aime_fast.data.augment import normalise
from aime_fast.data.dataset import DMCVBDataset
from aime_fast.data.prefetch import Prefetcher
from aime_fast.data.replay import EpisodeSource, Replay, lies_on_device, plain, replay_bytes
from aime_fast.data.synthetic import SyntheticEpisodes
from aime_fast.data.windows import Windows
from aime_fast.errors import DataError


def make_batches(config: DataConfig, seed: int, device: torch.device | str = "cpu") -> tuple[SequenceBatches, SequenceBatches]:
    """Training and validation batches of `config.data`: an HDF5 file, a folder of them, or "synthetic".

    Args:
        config: the data, what it must have been recorded with, and the sizes of sequences and batches.
        seed: of the split and of the order of the training sequences.
        device: where batches go; `config.replay` says whether the frames lie there too (`replay.lies_on_device`).
    Returns:
        (training, validation); the episodes of one are never in the other.
    Raises:
        DataError: the data are unusable, not what the config says, too few to be split, or too many for `--replay device`.
    """
    for name in ("sequence_length", "batch_size", "episodes", "image_size"):
        if getattr(config, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected at least 1")
    if not 0 <= config.validation_fraction < 1:
        raise DataError(f"--validation-fraction {config.validation_fraction}: expected a share in [0, 1)")
    source = _open_source(config, seed)
    try:
        n = source.num_episodes
        if n < 2:
            raise DataError(f"--data {config.data}: it holds {n} episode, expected at least 2, one to train on and one to validate on")
        held_out = min(max(1, round(config.validation_fraction * n)), n - 1)
        order = np.random.default_rng(seed).permutation(n)
        split = sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())
        needed = replay_bytes(sum(source.lengths), source.image_size, source.action_dim)
        resident = lies_on_device(config.replay, needed, _free_memory(torch.device(device)))
        return tuple(
            SequenceBatches(
                source,
                episodes,
                sequence_length=config.sequence_length,
                batch_size=config.batch_size,
                seed=seed,
                device=device,
                prefetch=config.prefetch,
                resident=resident,
            )
            for episodes in split
        )
    finally:
        source.close()


def _free_memory(device: torch.device) -> int | None:
    """Bytes free on a GPU; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _open_source(config: DataConfig, seed: int) -> EpisodeSource:
    if config.data is None:
        raise DataError("--data is not given; give an HDF5 file, a folder of them, or synthetic, or collect one first")
    if config.data == "synthetic":
        source = SyntheticEpisodes(config.episodes, config.image_size, seed)
        if config.sequence_length > min(source.lengths):
            raise DataError(f"--sequence-length {config.sequence_length}: synthetic episodes have {min(source.lengths)} frames, pass fewer")
        return source
    return DMCVBDataset(
        config.data,
        config.sequence_length,
        image_size=config.image_size,
        domain=config.domain,
        task=config.task,
        render_quality=config.render_quality,
        frame_skip=config.frame_skip,
    )


class SequenceBatches:
    """An endless iterator of batches: TensorDict [B, T] on `device` with `pixels` uint8 [B, T, 3, H, W], `action` float32
    [B, T, A], `reward` float32 [B, T, 1], `is_init` bool [B, T, 1].

    An epoch cuts every episode into sequences of T at a new random offset and shuffles them (see `Windows`). One thread works
    `prefetch` batches ahead (see `Replay` for its share), and `next` never waits for the device. An error in the thread is raised
    by `next`. A batch is for use on the stream that was current when it was taken.

    Args:
        source: episodes to copy into the replay.
        episodes: indices of those to take.
        sequence_length, batch_size: T, B.
        seed: of offsets and order.
        device: where batches go.
        prefetch: batches made ready ahead; 0 does all in the calling thread.
        resident: keep the frames on `device` instead of in a memory map on the host; the batches are the same bit for bit.
    Attributes:
        episodes: indices into the source. steps_per_epoch: batches an epoch, the same in every epoch.
        lengths: frames of each of them. action_dim, image_size: A; H = W. resident: as given.
    """

    def __init__(
        self,
        source: EpisodeSource,
        episodes: list[int],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
        resident: bool = False,
    ):
        self.episodes = list(episodes)
        self.action_dim, self.image_size = source.action_dim, source.image_size
        self.device = torch.device(device)
        self.prefetch = prefetch
        self._resident = resident
        self.lengths = lengths = [source.lengths[i] for i in self.episodes]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self._replay: Replay | None = Replay(source, self.episodes, self._offsets, self.device, resident)
        self._windows = Windows(lengths, sequence_length, batch_size, seed)
        self.steps_per_epoch = self._windows.steps_per_epoch
        self._consumed = 0
        self._thread: Prefetcher | None = None

    def __iter__(self) -> SequenceBatches:
        return self

    def __next__(self) -> TensorDict:
        replay = self._open_replay()
        make = partial(_prepare, replay, self._windows)
        if self.prefetch < 1:
            prepared = make(self._consumed)
        else:
            if self._thread is None:
                self._thread = Prefetcher(make, self._consumed, self.prefetch)
                weakref.finalize(self, self._thread.stop)
            try:
                prepared = self._thread.next()
            except BaseException:
                self._stop_thread()
                raise
        self._consumed += 1
        return replay.deliver(prepared)

    @property
    def resident(self) -> bool:
        """Whether the frames lie in the memory of the device."""
        return self._resident

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self._consumed // self.steps_per_epoch

    def one_pass(self) -> Iterator[TensorDict]:
        """Every episode once, from its first frame, in order, as sequences that do not overlap.

        The last batch may be smaller than B; an episode's remainder, shorter than T, is left out. The endless iterator stays
        where it is.
        """
        for rows in self._windows.in_order():
            yield self._batch(rows)

    def episode(self, index: int) -> TensorDict:
        """Episode `self.episodes[index]` whole: TensorDict [frames] on the device, keys as in a batch without B."""
        index = range(len(self.episodes))[index]  # negative indices, and IndexError
        return self._batch(torch.arange(self._offsets[index], self._offsets[index + 1]))

    def mean_frame(self) -> Tensor:
        """Mean of all frames, float32 [3, H, W] in [-1, 1], on the device."""
        pixels = plain(self._open_replay().frames["pixels"])
        total = sum(chunk.sum(0, dtype=torch.int64) for chunk in pixels.split(512))
        return normalise(total.double() / len(pixels)).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """The position: how many batches were taken, and what makes that number mean the same batches again."""
        return {"consumed": self._consumed, **self._windows.signature()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the very next batch after the position in `state`. Raises DataError if data, seed or sizes differ."""
        for key, value in self._windows.signature().items():
            if state.get(key) != value:
                raise DataError(
                    f"cannot resume: the checkpoint's data have {key} {state.get(key)}, these have {value}; resume with the same"
                )
        self._stop_thread()
        self._consumed = int(state["consumed"])

    def close(self) -> None:
        """Stop the thread and let go of the replay and its disk space. Also done when the object or the process ends."""
        self._stop_thread()
        self._replay = None

    def _stop_thread(self) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None

    def _batch(self, rows: Tensor) -> TensorDict:
        replay = self._open_replay()
        return replay.deliver(replay.prepare(rows))

    def _open_replay(self) -> Replay:
        if self._replay is None:
            raise RuntimeError("these SequenceBatches were closed; make new ones with make_batches")
        return self._replay


def _prepare(replay: Replay, windows: Windows, number: int) -> Any:
    # Not a method: the prefetch thread must not keep the SequenceBatches alive that is to stop it.
    return replay.prepare(windows.batch(number))
