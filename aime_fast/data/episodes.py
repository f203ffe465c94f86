"""Episodes in HDF5: one file a shard, one group an episode, attributes that describe the recording.

    shard.h5                    attributes: format_version, domain, task, seed, frame_skip, image_size, render_quality,
    |                           render_backend, policy, action_dim, position_names, versions (JSON), complete
    |- episode_00000/
    |    pixels    uint8   [T, H, W, 3]    picture at step t
    |    action    float32 [T, A]          taken after seeing pixels[t]; the last picture, which no action follows, is not stored
    |    reward    float32 [T]             received for action[t]
    |    discount  float32 [T]             after action[t]; 0 where the task ended, 1 everywhere else, also at a time limit
    |    is_init   bool    [T]             true at t = 0
    |    positions float32 [T, n, 2]       optional: the points `position_names` in pixels[t], (column, row) in pixels
    |- episode_00001/ ...

Pixels are stored in chunks of 16 frames: a training sequence reads few chunks, and a chunk compresses well because neighbouring
frames are similar. Every chunk has a checksum.
"""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from aime_fast.errors import DataError

FORMAT_VERSION = 1
CHUNK_FRAMES = 16
DTYPES = {"pixels": np.uint8, "action": np.float32, "reward": np.float32, "discount": np.float32, "is_init": np.bool_}
OPTIONAL = {"positions": np.float32}  # absent from files of other sources and from older files
# Attributes that all shards of a data set must agree on, with the flag that sets each.
SHARED = {
    "domain": "--domain",
    "task": "--task",
    "frame_skip": "--frame-skip",
    "image_size": "--image-size",
    "render_quality": "--render-quality",
    "action_dim": None,
}
RECOLLECT = "re-collect it with `python -m aime_fast.collect --overwrite --out FILE`"


def check_positive(settings: Any, *names: str) -> None:
    """Raise DataError, naming the flag, if one of these attributes of `settings` is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected at least 1")


class EpisodeWriter:
    """Writes a shard episode by episode to a temporary file in the same folder.

    Use it as a context manager. A normal exit gives the file its final name; an exception, or an exit without episodes, deletes it.
    So a file under the final name is always complete.

    Args:
        path: final name; its folder is created.
        attributes: file attributes; every key of `SHARED` must be among them.
    Raises:
        DataError: the attributes are incomplete, or the file cannot be written.
    """

    def __init__(self, path: str | Path, attributes: Mapping[str, Any]):
        if missing := sorted(set(SHARED) - set(attributes)):
            raise DataError(f"{path}: attributes {', '.join(missing)} are not given; an episode file must name them")
        self.path = Path(path)
        if self.path.is_dir():
            raise DataError(f"{path}: this is a folder, expected the name of a file to write")
        self._part = self.path.with_name(f".{self.path.name}.part-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = h5py.File(self._part, "w")
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error}); name a file in a folder that you can write to") from error
        self._file.attrs.update({**attributes, "format_version": FORMAT_VERSION, "complete": False})
        self.episodes = 0

    def write(self, episode: Mapping[str, np.ndarray]) -> None:
        """Append an episode: arrays with the names, dtypes and shapes of the module's table. Raises DataError if one differs."""
        name = f"episode_{self.episodes:05d}"
        group = self._file.create_group(name)
        for key, dtype in _dtypes(episode).items():
            value = np.asarray(episode[key])
            if value.dtype != dtype:
                raise DataError(f"{self.path}: dataset '{name}/{key}' would be {value.dtype}, expected {np.dtype(dtype)}")
            if key == "pixels":
                chunks = (min(CHUNK_FRAMES, len(value)), *value.shape[1:])
                group.create_dataset(key, data=value, chunks=chunks, compression="gzip", compression_opts=1, fletcher32=True)
            else:
                group.create_dataset(key, data=value, fletcher32=True)
        check_episode(group, self.path, self._file.attrs)
        self.episodes += 1

    def annotate(self, **attributes: Any) -> None:
        """Add attributes that are known only after recording."""
        self._file.attrs.update(attributes)

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self.episodes:
            self._file.attrs["complete"] = True
            self._file.close()
            os.replace(self._part, self.path)
        else:
            self._file.close()
            self._part.unlink(missing_ok=True)


def open_shard(path: str | Path) -> h5py.File:
    """Open a shard for reading. Raises DataError if it is missing, empty, damaged, unfinished or of another format."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give an HDF5 file or a folder of them, or collect one")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes), expected HDF5 episodes; {RECOLLECT}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        if not h5py.is_hdf5(path):
            raise DataError(f"{path}: this is not an HDF5 file; give a file written by aime_fast.collect, or {RECOLLECT}") from error
        raise DataError(f"{path}: the file is truncated or damaged ({error}); copy it again or {RECOLLECT}") from error
    try:
        version = file.attrs.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: attribute 'format_version' is {version}, expected {FORMAT_VERSION}; this file was written by another "
                f"program or version, {RECOLLECT}"
            )
        if not file.attrs.get("complete", False):
            raise DataError(f"{path}: attribute 'complete' is not set, the collection did not finish; {RECOLLECT}")
        for key in SHARED:
            if key not in file.attrs:
                raise DataError(f"{path}: attribute '{key}' is missing; {RECOLLECT}")
    except DataError:
        file.close()
        raise
    return file


def check_shard(file: h5py.File, path: str | Path, expected: Mapping[str, Any], sequence_length: int = 1) -> dict[str, int]:
    """Check the attributes of a shard and the type and shape of every data set in it.

    Args:
        file: an open shard.
        path: its name in messages.
        expected: values that attributes in `SHARED` must have; None or absent means any.
        sequence_length: smallest number of frames of an episode.
    Returns:
        frames of each episode, by group name, in order.
    Raises:
        DataError: names the file, the data set or attribute, its value, the expected value and the remedy.
    """
    for key, flag in SHARED.items():
        recorded, wanted = file.attrs[key], expected.get(key)
        if wanted is not None and recorded != wanted:
            remedy = f"pass {flag} {recorded}" if flag else "use the settings of the task it was recorded with"
            raise DataError(f"{path}: attribute '{key}' is {recorded}, expected {wanted}; {remedy}, or give another file with --data")
    names = sorted(name for name in file if name.startswith("episode_"))
    if not names:
        raise DataError(f"{path}: there is no group 'episode_00000', expected at least one episode; {RECOLLECT}")
    lengths = {}
    for name in names:
        lengths[name] = check_episode(file[name], path, file.attrs)
        if lengths[name] < sequence_length:
            raise DataError(
                f"{path}: '{name}' has {lengths[name]} frames, expected at least {sequence_length} (--sequence-length); "
                f"pass a shorter --sequence-length or collect with a smaller --frame-skip"
            )
    return lengths


def check_episode(group: h5py.Group, path: str | Path, attributes: Mapping[str, Any]) -> int:
    """Check dtypes and shapes of an episode against the attributes of its file; returns its frames. Raises DataError."""
    name = group.name.strip("/")
    size, action_dim = int(attributes["image_size"]), int(attributes["action_dim"])
    points = len(attributes.get("position_names", ()))
    trailing = {
        "pixels": (size, size, 3), "action": (action_dim,), "reward": (), "discount": (), "is_init": (), "positions": (points, 2),
    }  # fmt: skip
    frames: int | None = None
    present = set(group) if isinstance(group, h5py.Group) else set()
    for key, dtype in _dtypes(present).items():
        where = f"{path}: dataset '{name}/{key}'"
        if key not in present or not isinstance(group[key], h5py.Dataset):
            raise DataError(f"{where} is missing; {RECOLLECT}")
        dataset = group[key]
        shape = [frames if frames is not None else "T", *trailing[key]]
        wanted = f"expected {np.dtype(dtype)} [{', '.join(map(str, shape))}]"
        if dataset.dtype != dtype:
            raise DataError(f"{where} is {dataset.dtype}, {wanted}; {RECOLLECT}")
        frames = dataset.shape[0] if frames is None and dataset.ndim else frames
        if dataset.shape != (frames, *trailing[key]) or not frames:
            raise DataError(f"{where} has shape {list(dataset.shape)}, {wanted}; {RECOLLECT}")
    return frames


def _dtypes(names: Container[str]) -> dict[str, type]:
    """Dtypes of all required data sets, and of the optional ones among `names`."""
    return DTYPES | {key: dtype for key, dtype in OPTIONAL.items() if key in names}


def read_episode(group: h5py.Group, path: str | Path, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
    """Frames [start, stop) of an episode as arrays. Raises DataError if a chunk is damaged or a value is out of range."""
    name, episode = group.name.strip("/"), {}
    for key in _dtypes(group):
        try:
            episode[key] = group[key][start:stop]
        except OSError as error:
            raise DataError(f"{path}: dataset '{name}/{key}' is damaged ({error}); copy the file again or {RECOLLECT}") from error
    ranges = (("action", -1.0, 1.0), ("reward", -np.inf, np.inf), ("discount", 0.0, 1.0), ("positions", -np.inf, np.inf))
    for key, low, high in ranges:
        value = episode.get(key, np.zeros(0))
        bad = ~np.isfinite(value) | (value < low) | (value > high)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{path}: dataset '{name}/{key}' holds {value[where]} at frame {start + where[0]}, "
                f"expected finite values in [{low:g}, {high:g}]; {RECOLLECT}"
            )
    starts = np.flatnonzero(episode["is_init"]) + start
    if starts.tolist() != [0] * (start == 0):
        raise DataError(f"{path}: dataset '{name}/is_init' is true at frames {starts.tolist()}, expected at frame 0 only; {RECOLLECT}")
    return episode
