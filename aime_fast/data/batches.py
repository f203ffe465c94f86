"""Training batches: episodes are unpacked once into a replay of uint8 frames, and a thread gathers sequences ahead of the step.

HDF5 keeps data small. A memory map is twenty times faster to sample, and frames stored on the GPU need no copy from the host.
`make_batches` splits a data set by episode (`split.py`) and unpacks parts of it into `SequenceBatches`. The frames of batch n depend only
on the seed and on n (`windows.py`), not on where they are stored, so a run resumes from the number of batches taken.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from aime_fast.bounds import check
from aime_fast.config import DataConfig
from aime_fast.data.augment import normalise
from aime_fast.data.dataset import DMCVBDataset
from aime_fast.data.prefetch import Prefetcher
from aime_fast.data.replay import EpisodeSource, Replay, replay_bytes, replay_on_device
from aime_fast.data.split import Split, find_episodes, held_out_shares, split_episodes
from aime_fast.data.synthetic import SyntheticEpisodes
from aime_fast.data.windows import Windows
from aime_fast.errors import DataError
from aime_fast.runtime import ranks
from aime_fast.runtime.ranks import Ranks


def make_batches(
    config: DataConfig,
    seed: int,
    device: torch.device | str = "cpu",
    split: Split | None = None,
    parts: Sequence[str] = ("training", "validation"),
    share: Ranks = Ranks(),  # noqa: B008
) -> tuple[SequenceBatches, ...]:
    """Batches of parts of `config.data`: an HDF5 file, a folder of them, or "synthetic".

    Args:
        config: the data, how they must have been recorded, how they are split, and the sizes of sequences and batches.
        seed: of the order of sequences and of synthetic episodes.
        device: of the batches; `config.replay` says whether all frames are stored there too (`replay.replay_on_device`).
        split: that of a run, whose very episodes are taken, in its order; None splits the data by `split_episodes`.
        parts: of the split.
        share: of each batch, that this process takes; with several shares all processes of the run make these batches now.
    Returns:
        one for each of `parts`; no episode is in two. `split` of each names the episodes of all parts.
    Raises:
        ConfigError: a setting is out of bounds.
        DataError: the data are unusable, do not match the config or the split, are too few to split, or too many for `--replay device`.
    """
    check(config)
    with ExitStack() as opened:
        with ranks.failing_together() if share.size > 1 else nullcontext():
            source = opened.enter_context(closing(_open_source(config, seed)))
            if split is None:
                split = split_episodes(source.identities, *held_out_shares(config, source.attributes), config.split_seed)
            chosen = [find_episodes(getattr(split, part), source.identities, str(config.data)) for part in parts]
            needed = replay_bytes(sum(source.lengths[i] for part in chosen for i in part), source.image_size, source.action_dim)
            resident = replay_on_device(config.replay, needed, _free_memory(torch.device(device)))
        if share.size > 1:
            resident = not ranks.anywhere(not resident)[0]
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
                stills=config.stills > 0,
                split=split,
                share=share,
            )
            for episodes in chosen
        )


def _free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU; None for a CPU."""
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
        camera=config.camera,
        render_quality=config.render_quality,
        frame_skip=config.frame_skip,
    )


class SequenceBatches:
    """An endless iterator of batches: TensorDict [B, T] on `device` with `pixels` uint8 [B, T, 3, H, W], `action` float32
    [B, T, A], `reward`, `discount` float32 [B, T, 1], `is_init` bool [B, T, 1], and with `stills` also `stills` uint8 [B, T, 3, H, W]: as
    many single frames, drawn at random from all episodes.

    An epoch cuts every episode into sequences of T at a new random offset and shuffles them (see `Windows`). A thread prepares
    `prefetch` batches ahead (see `Replay.prepare`), and `next` never waits for the device. `next` raises the errors of the thread.
    Use a batch on the stream that was current when `next` returned it.

    Args:
        source: holds the episodes.
        episodes: indices of the episodes to unpack into the replay.
        sequence_length, batch_size: T, B.
        seed: of offsets and order.
        device: of the batches.
        prefetch: batches prepared ahead; 0 prepares each in the calling thread.
        stills: whether a batch has `stills`; those of `one_pass` and `episode` have none.
        split: of the source, for the records of a run.
        resident: store the frames on `device` instead of in a memory map on the host; the batches are bit-identical.
        share: of B that this process takes of every batch of the endless iterator; B and the order are those of all together. With
            several shares the replay is made by all (`Replay`, `together`).
    Attributes:
        episodes: indices into the source. lengths: frames of each. steps_per_epoch: batches of every epoch.
        action_dim, image_size: A; H = W. resident, split: as passed.
    Raises:
        DataError: an episode is damaged, or the disk is too small for the memory map. RuntimeError: used after `close`.
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
        stills: bool = False,
        split: Split | None = None,
        share: Ranks = Ranks(),  # noqa: B008
    ):
        self.share = share
        self.episodes, self.split, self.stills = list(episodes), split, stills
        self.action_dim, self.image_size = source.action_dim, source.image_size
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.resident = resident
        self.lengths = lengths = [source.lengths[i] for i in self.episodes]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self._replay: Replay | None = Replay(source, self.episodes, self._offsets, self.device, resident, share.size > 1)
        self._windows = Windows(lengths, sequence_length, batch_size, seed)
        self.steps_per_epoch = self._windows.steps_per_epoch
        self._consumed = 0
        self._thread: Prefetcher | None = None

    def __iter__(self) -> SequenceBatches:
        return self

    def __next__(self) -> TensorDict:
        replay = self._open_replay()
        make = partial(_prepare, replay, self._windows, self.stills, self.share)
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
        delivered = replay.deliver(prepared)
        if not self.stills:
            return delivered
        batch, stills = delivered.chunk(2)
        return batch.clone(recurse=False).set("stills", stills["pixels"])

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self._consumed // self.steps_per_epoch

    def one_pass(self, limit: int | None = None) -> Iterator[TensorDict]:
        """Every episode once, in order, as sequences that start at its first frame and do not overlap.

        The last batch may be smaller than B; an episode's remainder, shorter than T, is left out. With `limit` these are at most so many
        batches, of sequences spread evenly over all episodes. The endless iterator does not advance.
        """
        for rows in self._windows.in_order(limit):
            yield self._batch(rows)

    def episode(self, index: int) -> TensorDict:
        """The whole episode `self.episodes[index]`: TensorDict [frames] on the device, laid out as a batch without B."""
        index = range(len(self.episodes))[index]  # negative indices, and IndexError
        return self._batch(torch.arange(self._offsets[index], self._offsets[index + 1]))

    def mean_frame(self) -> Tensor:
        """Mean of all frames, float32 [3, H, W] in [-1, 1], on the device."""
        pixels = self._open_replay().frames["pixels"]
        total = sum(chunk.sum(0, dtype=torch.int64) for chunk in pixels.split(512)).cpu()  # rounded alike on every device
        return normalise(total.double() / len(pixels)).to(self.device)

    def mean_reward(self) -> float:
        """Mean of the rewards of all actions."""
        return self._open_replay().frames["reward"].double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        """The position: the number of batches taken, and the values that must be equal for it to mean the same batches."""
        return {"consumed": self._consumed, **self._windows.signature()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after the position in `state`. Raises DataError if data, seed or sizes differ."""
        for key, value in self._windows.signature().items():
            if state.get(key) != value:
                raise DataError(
                    f"cannot resume: the checkpoint's data have {key} {state.get(key)}, these have {value}; resume with the same {key}"
                )
        self._stop_thread()
        self._consumed = int(state["consumed"])

    def close(self) -> None:
        """Stop the thread and free the replay and its disk space. Also done when the object is deleted or the process ends."""
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


def _prepare(replay: Replay, windows: Windows, stills: bool, share: Ranks, number: int) -> Any:
    # Not a method: the thread would hold a reference to the SequenceBatches, whose finaliser stops the thread.
    rows = share.own(windows.batch(number))
    if stills:
        frames = share.own(windows.stills(number).flatten())  # frame by frame: an update may take half of them
        rows = torch.cat([rows, frames.view(rows.shape)])
    return replay.prepare(rows)
