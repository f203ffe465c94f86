"""HDF5 of others: a group an episode (as robomimic's `data/demo_0`), or columns of all episodes one after the other.

Columns are cut by `is_first`, or after `terminal`, `dones` and the like, as in V-D4RL's shards, or by `ep_len`, frames of each episode.
Names may be paths in a group, such as `obs/agentview_image`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np

from aime_fast.data.foreign.episode import KNOWN, Episode, Names, build, readable
from aime_fast.data.foreign.pictures import decoded
from aime_fast.errors import DataError

LENGTHS = ("ep_len", "episode_lengths")
ENDS = ("episode_ends", "timeouts")  # besides what is terminal


def read(source: Path, names: Names) -> Iterator[Episode]:
    """Episodes of the files of a folder, by name; or of one file."""
    paths = [source] if source.is_file() else sorted(path for end in ("*.h5", "*.hdf5") for path in source.rglob(end))
    for path in paths:
        with readable(str(path)), h5py.File(path, "r") as file:
            groups = _episodes(file)
            if groups:
                for group in groups:
                    where = f"{path}: {group.name}"
                    arrays = {what: group[name][()] for what, name in names.choose(_datasets(group), where).items()}
                    arrays["pixels"] = _pictures(where, arrays["pixels"])
                    yield build(where, arrays, leads=bool(names.leads))
            else:
                yield from _columns(file, names, str(path))


def _episodes(file: h5py.File) -> list[h5py.Group]:
    """Groups of one name and a number each, in this order, at the top or in a single group there."""
    places = [file, *(item for item in file.values() if isinstance(item, h5py.Group))]
    for place in places:
        numbered = [(name.rstrip("0123456789"), name) for name, item in place.items() if isinstance(item, h5py.Group)]
        found = [(int(name[len(stem) :]), name) for stem, name in numbered if name != stem]
        if found and len({stem for stem, name in numbered if name != stem}) == 1:
            return [place[name] for _, name in sorted(found)]
    return []


def _pictures(where: str, pixels: np.ndarray) -> np.ndarray:
    """Decoded where each is a file in bytes, as Minari stores JPEG: object [T], or uint8 [T, N] where all happen to be of one length."""
    coded = (pixels.dtype == object and pixels.ndim == 1) or (pixels.dtype == np.uint8 and pixels.ndim == 2)
    return decoded(where, [bytes(part) for part in pixels]) if coded else pixels


def _datasets(group: h5py.Group) -> list[str]:
    found: list[str] = []
    group.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return found


def _columns(file: h5py.File, names: Names, where: str) -> Iterator[Episode]:
    present = _datasets(file)
    chosen = names.choose(present, where)
    bounds = _bounds(file, present, chosen, where)
    for number, (begin, end) in enumerate(pairwise(bounds)):
        arrays = {what: file[name][begin:end] for what, name in chosen.items()}
        yield build(f"{where}: episode {number}, rows {begin} to {end}", arrays, leads=bool(names.leads))


def _bounds(file: h5py.File, present: list[str], chosen: dict[str, str], where: str) -> list[int]:
    """Row of the first frame of each episode, and the number of rows."""
    rows = len(file[chosen["pixels"]])
    if name := next((name for name in LENGTHS if name in present), None):
        bounds = np.concatenate([[0], np.cumsum(file[name][()])])
        if bounds[-1] != rows:
            raise DataError(f"{where}: {name} adds up to {bounds[-1]} frames, there are {rows}")
        return bounds.tolist()
    if "first" in chosen:
        firsts = np.flatnonzero(file[chosen["first"]][()]).tolist()
        return [*sorted({0, *firsts}), rows]
    ends = [np.flatnonzero(file[name][()].reshape(-1)) + 1 for name in (chosen.get("terminal"), *ENDS) if name in present]
    if not ends:
        known = ", ".join((*LENGTHS, *KNOWN["first"], *ENDS))
        raise DataError(f"{where}: where do episodes begin? there is none of {known}, and nothing terminal")
    return sorted({0, *np.concatenate(ends).tolist(), rows})
