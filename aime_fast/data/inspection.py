"""Looks through episode files as they are, damaged ones too: what is in them, and every fault, not the first alone.

`DMCVBDataset` refuses a file at its first fault. Here each is noted, and what can still be read is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from aime_fast.data.checksums import episode_sha256, identity
from aime_fast.data.dataset import SUFFIXES
from aime_fast.data.episodes import (
    CHUNK_FRAMES,
    COPY_AGAIN,
    OMITTED,
    SHARED,
    check_episode,
    check_link,
    dtypes,
    in_order,
    open_shard,
    read_attributes,
    readable,
    recorded_sha256,
    to_python,
)
from aime_fast.data.faults import Fault, Pictures, Place, value_faults
from aime_fast.data.totals import between_episodes, totals
from aime_fast.errors import DataError

RUN_FILES = ("run.json", "config.yaml", "metrics.jsonl")  # of a run's folder


class Read(NamedTuple):
    """What was read of an episode."""

    row: dict[str, Any]  # of the table of episodes
    episode: dict[str, np.ndarray]  # arrays as in the file, without pixels; those that can be read


def shards_in(folder: Path) -> list[Path]:
    """The HDF5 files of a folder, in the order in which training reads them."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))


def is_run(folder: Path) -> bool:
    """Whether a run has written into a folder, which then may hold episodes too."""
    return any((folder / name).is_file() for name in RUN_FILES) or any(folder.glob("checkpoint_*.pt*"))


def is_hdf5(path: Path) -> bool:
    """Whether a file is of the format, or is named so, as one that is damaged may be."""
    return path.suffix in SUFFIXES or h5py.is_hdf5(path)


def inspect_data(
    paths: Sequence[Path], verify: bool = False, advance: Callable[[int], None] = lambda frames: None
) -> tuple[dict[str, Any], list[Fault]]:
    """What is in the episodes of these files.

    Args:
        paths: HDF5 files that are used as one data set.
        verify: read every byte and compare all checksums; otherwise all numbers are read, and of each episode 32 pictures at most.
        advance: called with the frames of each episode.
    Returns:
        (facts, faults): what `totals` describes, and `episode_table` with a row an episode; findings in the order of the files.
    Raises:
        DataError: none of the files can be opened, or a single one is of another program.
    """
    faults: list[Fault] = []
    attributes: dict[str, Any] = {}
    storage: list[dict[str, Any]] = []
    found: list[Read] = []
    for path in paths:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(open_shard(path))
                own = _attributes(file, path, faults)
            except DataError as error:
                faults.append(Fault("file", True, str(error), str(path)))
                continue
            attributes = attributes or own
            _compare(path, own, attributes, paths[0], faults)
            storage.append(_storage(file, path))
            for name in _names(file, path, faults):
                found.append(_inspect_episode(file, Place(path, name), own, verify, faults))
                advance(found[-1].row["frames"] or 0)
    if not storage:
        raise DataError(faults[0].message)
    rows = [{"index": i, **read.row} for i, read in enumerate(found)]
    faults += between_episodes(rows, [read.episode for read in found], attributes)
    return totals(paths, rows, [read.episode for read in found], attributes, storage, verify), faults


def read_raw(path: Path, name: str) -> dict[str, np.ndarray]:
    """An episode's arrays as they are stored, without a look at their values. Raises DataError if a part of it is damaged."""
    with open_shard(path) as file, readable(path, f"'{name}'"):
        check_link(file, name, path)
        return {key: file[name][key][()] for key in ("pixels", "action", "reward")}


def _attributes(file: h5py.File, path: Path, faults: list[Fault]) -> dict[str, Any]:
    """As `read_attributes` where they are right; else those that can be read. Raises DataError for a file of another program."""
    try:
        return read_attributes(file, path)
    except DataError as error:
        names, groups = [], []
        with suppress(DataError), readable(path, "the list"):
            names = list(file.attrs)
            groups = [name for name in file if name.startswith("episode_")]
        if "format_version" not in names and not groups:
            raise DataError(
                f"{path}: this HDF5 file is of another program (there is no attribute 'format_version'); convert it with "
                f"`python -m aime_fast.convert {path} --out FILE`"
            ) from error
        faults.append(Fault("attributes", True, str(error), str(path)))
    values: dict[str, Any] = {}
    for name in names:
        with suppress(DataError), readable(path, f"attribute '{name}'"):
            values[name] = to_python(file.attrs[name])
    return OMITTED | values


def _compare(path: Path, own: dict[str, Any], first: dict[str, Any], first_path: Path, faults: list[Fault]) -> None:
    """Attributes that shards of one data set must share."""
    for key in SHARED:
        if own.get(key) != first.get(key):
            said = f"{path}: attribute '{key}' is {own.get(key)}, expected {first.get(key)} as in {first_path}"
            remedy = "shards of different recordings cannot be mixed, keep them in folders of their own"
            faults.append(Fault("settings", True, f"{said}; {remedy}", str(path), value=str(own.get(key))))


def _names(file: h5py.File, path: Path, faults: list[Fault]) -> list[str]:
    try:
        with readable(path, "the list of episodes"):
            names = in_order(name for name in file if name.startswith("episode_"))
            if not names:
                raise DataError(f"{path}: no episode is in it; {COPY_AGAIN}")
            return names
    except DataError as error:
        faults.append(Fault("structure", True, str(error), str(path)))
        return []


def _inspect_episode(file: h5py.File, place: Place, attributes: dict[str, Any], verify: bool, faults: list[Fault]) -> Read:
    """Reads an episode as far as it can be read."""
    row: dict[str, Any] = {
        "file": str(place.file), "episode": place.episode, "frames": None, "bytes": None, "identity": None, "checked": "damaged",
        "return": None, "terminals": None, "pictures": Pictures().counts(),
    }  # fmt: skip
    before = len(faults)
    try:
        with readable(place.file, f"'{place.episode}'"):
            check_link(file, place.episode, place.file)
            group = file[place.episode]
            row["frames"] = frames = check_episode(group, place.file, attributes)
            stored = recorded_sha256(group, place.file) if "sha256" in group.attrs else None
            row["bytes"] = sum(group[key].id.get_storage_size() for key in dtypes(group))
    except DataError as error:
        faults.append(Fault("structure", True, str(error), str(place.file), place.episode))
        return Read(row, {})
    episode: dict[str, np.ndarray] = {}
    for key in dtypes(group):
        if key != "pixels":
            with _noting(place, None, faults), readable(place.file, f"dataset '{place.episode}/{key}'"):
                episode[key] = group[key][()]
    pictures, pixels = Pictures(), np.empty(group["pixels"].shape, np.uint8) if verify else None
    for start, stop in _pieces(frames, verify):
        with _noting(place, start, faults), readable(place.file, f"dataset '{place.episode}/pixels', frames {start} to {stop - 1},"):
            piece = group["pixels"][start:stop]
            pictures.look(piece, start)
            if pixels is not None:
                pixels[start:stop] = piece
    if pixels is not None and len(faults) == before:
        sha256 = episode_sha256({**episode, "pixels": pixels})
        if stored is not None and stored != sha256:
            said = f"{place.file}: the frames of '{place.episode}' differ from its checksum 'sha256'; {COPY_AGAIN}"
            faults.append(Fault("checksum", True, said, str(place.file), place.episode, value=sha256))
        stored = stored or sha256
    state = "damaged" if len(faults) > before else "not re-read" if not verify else "verified" if "sha256" in group.attrs else "no checksum"
    faults += value_faults(place, episode)
    faults += pictures.faults(place, frames)
    reward, discount = episode.get("reward"), episode.get("discount")
    row |= {"identity": stored and identity(stored), "checked": state, "pictures": pictures.counts()}
    row["return"] = float(reward.sum(dtype=np.float64)) if reward is not None and np.isfinite(reward).all() else None
    row["terminals"] = int((discount == 0).sum()) if discount is not None else None
    return Read(row, episode)


@contextmanager
def _noting(place: Place, frame: int | None, faults: list[Fault]) -> Iterator[None]:
    """A DataError becomes a fault of the episode."""
    try:
        yield
    except DataError as error:
        faults.append(Fault("unreadable", True, str(error), str(place.file), place.episode, frame))


def _pieces(frames: int, verify: bool) -> Iterator[tuple[int, int]]:
    """Chunks of frames to look at: all of them, or the first and one in the middle."""
    starts = list(range(0, frames, CHUNK_FRAMES))
    for start in starts if verify else sorted({starts[0], starts[len(starts) // 2]}):
        yield start, min(frames, start + CHUNK_FRAMES)


def _storage(file: h5py.File, path: Path) -> dict[str, Any]:
    """How the pictures of the first episode that can be opened are stored."""
    facts: dict[str, Any] = {"codec": None, "chunks": None}
    with suppress(DataError), readable(path, "the list"):
        for name in file:
            pixels = file[name].get("pixels") if isinstance(file[name], h5py.Group) else None
            if isinstance(pixels, h5py.Dataset):
                creation = pixels.id.get_create_plist()
                filters = [creation.get_filter(i) for i in range(creation.get_nfilters())]
                codec = ", ".join(" ".join([name.decode() or f"filter {code}", *map(str, given[:1])]) for code, _, given, name in filters)
                facts |= {"codec": codec or "none", "chunks": list(pixels.chunks) if pixels.chunks else None}
                break
    return facts
