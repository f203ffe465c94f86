"""`DMCVBDataset`: sequences of frames from HDF5 shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from tensordict import TensorDict
from torch.utils.data import Dataset

from aime_fast.data.augment import normalise
from aime_fast.data.checksums import episode_sha256, identity
from aime_fast.data.episodes import (
    FORMAT_VERSION,
    SHARED,
    check_positive,
    check_shard,
    open_shard,
    read_attributes,
    read_episode,
    recorded_sha256,
)
from aime_fast.errors import DataError, explain

SUFFIXES = (".h5", ".hdf5")


class DMCVBDataset(Dataset):
    """Sequences of T frames from recorded episodes; a sequence never crosses an episode boundary.

    Item i is a TensorDict [T]: `pixels` uint8 [T, 3, H, W], `action` float32 [T, A], `reward` float32 [T, 1], `discount` float32
    [T, 1], `is_init` bool [T, 1], and, if every shard has them, `positions` float32 [T, n, 2]; and, as AIME's items have, `observations`
    float32 [T, 3, H, W] in [-1, 1] and `actions` float32 [T, A]. Sequences start every T frames; an
    episode's remainder is left out. Use `torch.stack` as a DataLoader's `collate_fn`. Any number of loader processes may read at
    once. Training uses `make_batches`, which is faster.

    Args:
        root: HDF5 file, folder of shards (`*.h5`, `*.hdf5`), folder of an RLDS data set such as DMC-VB, which is converted into a cache
            when it is first opened, or a list of files. In text, commas separate several of them, and each may have wildcards, as in
            "shards/*.h5".
        sequence_length: T.
        image_size, domain, task, camera, render_quality, action_dim, frame_skip: settings that the shards must have been recorded with;
            None takes the value of the first shard. All shards must agree.
    Attributes:
        action_dim, image_size: A; H = W.
        num_episodes, lengths: episodes in all shards of at least T frames; frames of each.
        skipped: names of the shorter episodes, which are left out; one printed line counts them.
        identities: short checksum of the content of each episode, the same in every file that holds it.
        verified: whether every shard has checksums over content and attributes; one printed line names the first that has none.
        attributes: of the first shard, as Python values; `versions` is a dictionary.
        position_names: of the n points in `positions`; empty unless all shards have the same names.
    Raises:
        DataError: a shard is damaged, has other settings, or no episode has T frames.
    """

    def __init__(
        self,
        root: str | Path | Sequence[str | Path],
        sequence_length: int,
        *,
        image_size: int | None = None,
        domain: str | None = None,
        task: str | None = None,
        camera: str | None = None,
        render_quality: str | None = None,
        action_dim: int | None = None,
        frame_skip: int | None = None,
    ):
        self.sequence_length = sequence_length
        check_positive(self, "sequence_length")
        self.paths = _shards(root, image_size)
        expected = {
            "image_size": image_size, "domain": domain, "task": task, "camera": camera,
            "render_quality": render_quality, "action_dim": action_dim, "frame_skip": frame_skip,
        }  # fmt: skip
        self.attributes: dict[str, Any] = {}
        position_names: set[tuple[str, ...]] = set()
        self._episodes: list[tuple[Path, str]] = []
        self._sha256: list[str | None] = []
        self.lengths: list[int] = []
        self.skipped: list[str] = []
        unverified: list[Path] = []
        longest = 0
        for shard in self.paths:
            with open_shard(shard) as file:
                attributes = read_attributes(file, shard)
                lengths = check_shard(file, shard, attributes, expected)
                has_positions = all("positions" in file[name] for name in lengths)
                has_checksums = attributes["format_version"] == FORMAT_VERSION
                checksums = {name: recorded_sha256(file[name], shard) if has_checksums else None for name in lengths}
            position_names.add(attributes["position_names"] if has_positions else ())
            unverified += [] if has_checksums else [shard]
            self.attributes = self.attributes or attributes
            for key in SHARED:
                if attributes[key] != self.attributes[key]:
                    raise DataError(
                        f"{shard}: attribute '{key}' is {attributes[key]}, expected {self.attributes[key]} as in "
                        f"{self.paths[0]}; shards of different recordings cannot be mixed, give them one at a time"
                    )
            longest = max(longest, *lengths.values())
            long = [name for name, length in lengths.items() if length >= sequence_length]
            self.skipped += [f"{shard}: {name}" for name in lengths if name not in long]
            self._episodes += [(shard, name) for name in long]
            self._sha256 += [checksums[name] for name in long]
            self.lengths += [lengths[name] for name in long]
        if not self.lengths:
            raise DataError(
                f"{self.paths[0]}: the longest episode has {longest} frames, expected at least {sequence_length} (--sequence-length); "
                f"pass a shorter --sequence-length or collect with a smaller --frame-skip"
            )
        self.verified = not unverified
        self._say(unverified)
        self.action_dim, self.image_size = self.attributes["action_dim"], self.attributes["image_size"]
        self.position_names = position_names.pop() if len(position_names) == 1 else ()
        self.num_episodes = len(self._episodes)
        self._windows = [
            (episode, start)
            for episode, length in enumerate(self.lengths)
            for start in range(0, length - sequence_length + 1, sequence_length)
        ]
        self._open: dict[tuple[int, Path], h5py.File] = {}

    def _say(self, unverified: list[Path]) -> None:
        """Print what the user should know about the files."""
        if unverified:
            more = f" and {len(unverified) - 1} more" if len(unverified) > 1 else ""
            print(f"{unverified[0]}{more}: an older format without checksums over its content; it is read unverified", file=sys.stderr)
        if self.skipped:
            n, total = len(self.skipped), len(self.skipped) + len(self.lengths)
            print(
                f"{n} of {total} episodes {'is' if n == 1 else 'are'} left out, shorter than {self.sequence_length} frames "
                f"(--sequence-length); the first is {self.skipped[0]}",
                file=sys.stderr,
            )

    @cached_property
    def identities(self) -> list[str]:
        """16 hexadecimal digits for each episode. They are stored in the file; for a file of format 1 its episodes are read."""
        stored = zip(self._sha256, self._episodes)
        return [identity(sha256 or episode_sha256(self._arrays(*episode, 0, None))) for sha256, episode in stored]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> TensorDict:
        episode, start = self._windows[index]
        item = self._read(episode, start, start + self.sequence_length)
        return item.update({"observations": normalise(item["pixels"]), "actions": item["action"]})

    def read_episode(self, index: int) -> TensorDict:
        """Episode `index` as a TensorDict [frames], laid out as a sequence. Raises DataError if it is damaged."""
        return self._read(index, 0, None)

    def _read(self, episode: int, start: int, stop: int | None) -> TensorDict:
        arrays = self._arrays(*self._episodes[episode], start, stop)
        if not self.position_names:  # only some shards have them, and sequences to be stacked need the same keys
            arrays.pop("positions", None)
        return to_tensordict(arrays)

    def _arrays(self, path: Path, name: str, start: int, stop: int | None) -> dict[str, np.ndarray]:
        key = (os.getpid(), path)  # an HDF5 handle does not survive a fork
        if key not in self._open:
            self._open[key] = open_shard(path)
        return read_episode(self._open[key][name], path, start, stop)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def to_tensordict(episode: dict[str, np.ndarray]) -> TensorDict:
    """Arrays laid out as in the file (`episodes.py`) to a TensorDict [T]: pixels [T, 3, H, W], scalars [T, 1]."""
    # Copied by NumPy: PyTorch's own memory is aligned, so it does not fit where an array was freed, and a process that reads one episode
    # after the other would grow by each of them.
    episode = {**episode, "pixels": np.ascontiguousarray(episode["pixels"].transpose(0, 3, 1, 2))}  # [T, 3, H, W]
    values = {key: torch.from_numpy(value) for key, value in episode.items()}
    values = {key: value[:, None] if value.dim() == 1 else value for key, value in values.items()}
    return TensorDict(values, batch_size=[len(values["pixels"])])


def _shards(root: str | Path | Sequence[str | Path], image_size: int | None) -> list[Path]:
    """The files that `root` names, in its order; `image_size` is that of what is converted. Raises DataError where there is none."""
    if isinstance(root, str) and not os.path.exists(root) and any(sign in root for sign in ",*?["):
        parts = [part.strip() for part in root.split(",")]
        if "" in parts:
            raise DataError(f"--data {root}: a name is missing before or after a comma; give HDF5 files or folders of them, A,B")
        return [shard for part in parts for path in _matching(part) for shard in _in_folder(path, image_size)]
    if not isinstance(root, (str, Path)):
        if not root:
            raise DataError("--data: the list of HDF5 files is empty, expected at least one")
        return [Path(path) for path in root]
    return _in_folder(Path(root), image_size)


def _matching(pattern: str) -> list[Path]:
    if os.path.exists(pattern) or not has_magic(pattern):
        return [Path(pattern)]
    found = sorted(glob(pattern, recursive=True))
    if not found:
        raise DataError(f"--data {pattern}: no file matches; give an HDF5 file or a folder of them, or collect one")
    return [Path(path) for path in found]


def _in_folder(path: Path, image_size: int | None) -> list[Path]:
    """A file as it is; of a folder, its shards, or what `cached.converted` makes of it."""
    from aime_fast.data.cached import converted

    try:
        if not path.is_dir():
            return [path]
        shards = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({explain(error)})") from error
    if not shards and (file := converted(path, image_size)):
        return [file]
    if not shards:
        raise DataError(f"{path}: the folder holds no {' or '.join(SUFFIXES)} file; collect one with `python -m aime_fast.collect`")
    return shards
