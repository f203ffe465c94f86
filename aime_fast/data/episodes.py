"""Episodes in HDF5: one file a shard, one group an episode, attributes that describe the recording.

    shard.h5                    attributes: format_version, domain, task, seed, frame_skip, image_size, camera, render_quality,
    |                           render_backend, policy, action_dim, position_names, versions (JSON), complete, attributes_sha256
    |- episode_00000/           attribute: sha256
    |    pixels    uint8   [T, H, W, 3]    picture at step t
    |    action    float32 [T, A]          taken after seeing pixels[t]; the last picture, which no action follows, is not stored
    |    reward    float32 [T]             received for action[t]
    |    discount  float32 [T]             after action[t]; 0 where the task ended, 1 everywhere else, also at a time limit
    |    is_init   bool    [T]             true at t = 0
    |    positions float32 [T, n, 2]       optional: the points `position_names` in pixels[t], (column, row) in pixels
    |- episode_00001/ ...

Pixels are stored in chunks of 16 frames: a training sequence reads few chunks, and a chunk compresses well because neighbouring
frames are similar. Every chunk has a checksum, and so has HDF5's own metadata. `sha256` is over the content of the episode, and
`attributes_sha256` over the attributes of the file and over the checksums of its episodes (`checksums.py`). Files of format 1 have
neither: they are read, and marked as unverified.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from aime_fast.data.checksums import attributes_sha256, episode_sha256
from aime_fast.errors import DataError, explain

FORMAT_VERSION = 2
UNVERIFIED_VERSION = 1  # no checksums over content and attributes
LIBVER = ("v110", "v110")  # the newest HDF5 layout that version 1.10 of the library reads; its metadata have checksums
CHUNK_FRAMES = 16
DTYPES = {"pixels": np.uint8, "action": np.float32, "reward": np.float32, "discount": np.float32, "is_init": np.bool_}
OPTIONAL = {"positions": np.float32}  # absent from files of other sources and from older files
RANGES = (("action", -1.0, 1.0), ("reward", -np.inf, np.inf), ("discount", 0.0, 1.0), ("positions", -np.inf, np.inf))
# Attributes that all shards of a data set must agree on, with the flag that sets each.
SHARED = {
    "domain": "--domain",
    "task": "--task",
    "frame_skip": "--frame-skip",
    "image_size": "--image-size",
    "camera": "--camera",
    "render_quality": "--render-quality",
    "action_dim": None,
}
UNRECORDED = "none"  # the attribute `rewards` of a file whose rewards are zeros because none were recorded
OMITTED = {"camera": "0"}  # what those mean that a file lacks, as files of older versions do
ATTRIBUTE_TYPES = {key: int if key in ("frame_skip", "image_size", "action_dim") else str for key in SHARED}
RECOLLECT = "re-collect it with `python -m aime_fast.collect --overwrite --out FILE`"
COPY_AGAIN = f"copy the file again or {RECOLLECT}"


def check_positive(settings: Any, *names: str) -> None:
    """Raise DataError, naming the flag, if one of these attributes of `settings` is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(settings, name)}: expected at least 1")


@contextmanager
def readable(path: str | Path, what: str) -> Iterator[None]:
    """Turn what HDF5 raises on damaged files into a DataError that names the file and the part of it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: {what} is damaged ({reason}); {COPY_AGAIN}") from error


def open_shard(path: str | Path) -> h5py.File:
    """Open a shard for reading. Raises DataError if it is missing, empty or not HDF5. `read_attributes` says whether it is whole."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{path}: this is not a regular file; give an HDF5 file or a folder of them")
        with open(path, "rb"):
            pass  # HDF5's own message for a file that may not be read does not say so
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file; give an HDF5 file or a folder of them, or collect one") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({explain(error)})") from error
    if size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes), expected HDF5 episodes; {RECOLLECT}")
    try:
        return h5py.File(path, "r")
    except (OSError, RuntimeError, LookupError, ValueError) as error:
        if isinstance(error, BlockingIOError):
            raise DataError(f"{path}: another process is writing this file; wait until it has ended") from error
        if not h5py.is_hdf5(path):
            raise DataError(f"{path}: this is not an HDF5 file; give a file written by aime_fast.collect, or {RECOLLECT}") from error
        raise DataError(f"{path}: the file is truncated or damaged ({error}); copy it again or {RECOLLECT}") from error


def read_attributes(file: h5py.File, path: str | Path) -> dict[str, Any]:
    """The attributes of an open shard as Python values, arrays as tuples.

    Raises DataError if the file is of another format or unfinished, or if an attribute cannot be read, is missing, of another type, or
    if they differ from their checksum.
    """
    values: dict[str, Any] = {}
    with readable(path, "the list of attributes"):
        names = list(file.attrs)
    for name in names:
        with readable(path, f"attribute '{name}'"):
            values[name] = to_python(file.attrs[name])
    known = (UNVERIFIED_VERSION, FORMAT_VERSION)
    if values.get("format_version") not in known:
        raise DataError(
            f"{path}: attribute 'format_version' is {values.get('format_version')}, expected {known[0]} or {known[1]}; this file was "
            f"written by another program or version, {RECOLLECT}"
        )
    if values["format_version"] == FORMAT_VERSION and values.get("attributes_sha256") != file_sha256(file, path, values):
        raise DataError(f"{path}: the attributes or the list of episodes differ from the checksum 'attributes_sha256'; {COPY_AGAIN}")
    if values.get("complete") is not True:
        raise DataError(f"{path}: attribute 'complete' is not set, the collection did not finish; {RECOLLECT}")
    values = OMITTED | values
    for key, kind in ATTRIBUTE_TYPES.items():
        if key not in values:
            raise DataError(f"{path}: attribute '{key}' is missing; {RECOLLECT}")
        if type(values[key]) is not kind or (kind is int and values[key] < 1):
            wanted = "text" if kind is str else "a whole number of at least 1"
            raise DataError(f"{path}: attribute '{key}' is {values[key]!r}, expected {wanted}; {RECOLLECT}")
    names = values.setdefault("position_names", ())
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: attribute 'position_names' is {names!r}, expected a list of names; {RECOLLECT}")
    try:
        values["versions"] = dict(json.loads(values.get("versions", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: attribute 'versions' is {values['versions']!r}, expected a JSON object; {RECOLLECT}") from error
    return values


def file_sha256(file: h5py.File, path: str | Path, attributes: Mapping[str, Any]) -> str:
    """The checksum that `attributes_sha256` of an open shard must have, for these attributes of it."""
    covered = {key: value for key, value in attributes.items() if key != "attributes_sha256"}
    return attributes_sha256(covered, {name: recorded_sha256(file[name], path) for name in episode_names(file, path)})


def recorded_sha256(group: h5py.Group, path: str | Path) -> str:
    """The checksum stored with an episode. Raises DataError if there is none."""
    with readable(path, f"attribute 'sha256' of '{group.name.strip('/')}'"):
        return to_python(group.attrs["sha256"])


def check_shard(file: h5py.File, path: str | Path, attributes: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, int]:
    """Check the attributes of a shard and the type, shape and storage of every data set in it, without reading the data.

    Args:
        file: an open shard.
        path: its name in messages.
        attributes: as `read_attributes` returns them.
        expected: values that attributes in `SHARED` must have; None or absent means any.
    Returns:
        frames of each episode, by group name, in order.
    Raises:
        DataError: names the file, the data set or attribute, its value, the expected value and the remedy.
    """
    for key, flag in SHARED.items():
        recorded, wanted = attributes[key], expected.get(key)
        if wanted is not None and recorded != wanted:
            remedy = f"pass {flag} {recorded}" if flag else "use the settings of the task it was recorded with"
            raise DataError(f"{path}: attribute '{key}' is {recorded}, expected {wanted}; {remedy}, or give another file with --data")
    names = episode_names(file, path)
    if not names:
        raise DataError(f"{path}: there is no group 'episode_00000', expected at least one episode; {RECOLLECT}")
    return {name: check_episode(file[name], path, attributes) for name in names}


def episode_names(file: h5py.File, path: str | Path) -> list[str]:
    """Groups of an open shard that are episodes, in order. Raises DataError where one is damaged, or a link."""
    with readable(path, "the list of episodes"):
        names = in_order(name for name in file if name.startswith("episode_"))
        for name in names:
            check_link(file, name, path)
            file[name]  # raises here, where the error is caught, if the group is damaged
        return names


def in_order(names: Iterable[str]) -> list[str]:
    """Names of episodes by number, of which those above 99999 are longer."""
    return sorted(names, key=lambda name: (len(name), name))


def check_link(group: h5py.Group, name: str, path: str | Path) -> None:
    """Raise DataError if `name` is not stored in this file: a soft or external link can name any file that the user may read."""
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        kind = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
        raise DataError(
            f"{path}: '{f'{group.name}/{name}'.strip('/')}' is {kind} to {link.path}, expected data in this file; "
            f"copy the data with `h5copy`, or {RECOLLECT}"
        )


def check_episode(group: h5py.Group, path: str | Path, attributes: Mapping[str, Any]) -> int:
    """Check dtypes, shapes and storage of an episode against the attributes of its file; returns its frames. Raises DataError."""
    name = group.name.strip("/")
    size, action_dim = int(attributes["image_size"]), int(attributes["action_dim"])
    points = len(attributes.get("position_names", ()))
    trailing = {
        "pixels": (size, size, 3), "action": (action_dim,), "reward": (), "discount": (), "is_init": (), "positions": (points, 2),
    }  # fmt: skip
    frames: int | None = None
    with readable(path, f"'{name}'"):
        present = set(group) if isinstance(group, h5py.Group) else set()
    for key, dtype in dtypes(present).items():
        where = f"{path}: dataset '{name}/{key}'"
        with readable(path, f"dataset '{name}/{key}'"):
            if key in present:
                check_link(group, key, path)
            dataset = group[key] if key in present else None
            if not isinstance(dataset, h5py.Dataset):
                raise DataError(f"{where} is missing; {RECOLLECT}")
            shape = [frames if frames is not None else "T", *trailing[key]]
            wanted = f"expected {np.dtype(dtype)} [{', '.join(map(str, shape))}]"
            if dataset.dtype != dtype:
                raise DataError(f"{where} is {dataset.dtype}, {wanted}; {RECOLLECT}")
            if dataset.shape is None:
                raise DataError(f"{where} is empty, {wanted}; {RECOLLECT}")
            frames = dataset.shape[0] if frames is None and dataset.ndim else frames
            if dataset.shape != (frames, *trailing[key]) or not frames:
                raise DataError(f"{where} has shape {list(dataset.shape)}, {wanted}; {RECOLLECT}")
            check_storage(dataset, where)
    return frames


def check_storage(dataset: h5py.Dataset, where: str) -> None:
    """Raise DataError unless all values of a data set are stored in its own file. Missing ones would be read as zeros."""
    if dataset.is_virtual or dataset.external is not None:
        kind = "a virtual dataset" if dataset.is_virtual else "stored in another file"
        raise DataError(f"{where} is {kind}, expected data in this file; copy the data with `h5repack`, or {RECOLLECT}")
    if dataset.chunks is None:
        stored, needed, unit = dataset.id.get_storage_size(), dataset.nbytes, "bytes"
    else:
        needed = math.prod(-(-length // chunk) for length, chunk in zip(dataset.shape, dataset.chunks))
        stored, unit = dataset.id.get_num_chunks(), "chunks"
    if stored < needed:
        raise DataError(f"{where} has {stored} of {needed} {unit}, the rest was never written; {COPY_AGAIN}")


def dtypes(names: Container[str]) -> dict[str, type]:
    """Dtypes of all required data sets, and of the optional ones among `names`."""
    return DTYPES | {key: dtype for key, dtype in OPTIONAL.items() if key in names}


def read_episode(group: h5py.Group, path: str | Path, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
    """Frames [start, stop) of an episode as arrays.

    Raises DataError if a chunk is damaged, a value is out of range, or a whole episode differs from its checksum.
    """
    name, episode = group.name.strip("/"), {}
    for key in dtypes(group):
        with readable(path, f"dataset '{name}/{key}'"):
            episode[key] = group[key][start:stop]
    if start == 0 and stop is None and "sha256" in group.attrs and episode_sha256(episode) != recorded_sha256(group, path):
        raise DataError(f"{path}: the frames of '{name}' differ from its checksum 'sha256'; {COPY_AGAIN}")
    for key, low, high in RANGES:
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


def to_python(value: Any) -> Any:
    """An attribute as a Python value: arrays as tuples, bytes as text."""
    if isinstance(value, np.ndarray):
        return tuple(to_python(each) for each in value.tolist())
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, list):
        return tuple(to_python(each) for each in value)
    return value.decode() if isinstance(value, bytes) else value
