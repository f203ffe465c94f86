"""HDF5 of others: a group an episode (as robomimic's `data/demo_0`), or columns of all episodes one after the other, cut as `bounds` says.

Names may be paths in a group, such as `obs/agentview_image`. In a row lie a picture and the action taken after it, but for two writers.
V-D4RL (conglu1997/v-d4rl, conversion_scripts/npz_to_hdf5.py) joins the arrays of Dreamer and adds `step_type`: where that is, an action
led to the picture of its row. stable-worldmodel (galilai-group/stable-worldmodel, World.record_dataset) moves `action` up by one row and
puts NaN into the last one of an episode, but leaves `reward`, `terminated` and `truncated` with the picture that they came with: take
rewards from there with `--map reward=next/reward`. It compresses with Blosc, which is in `hdf5plugin`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from aime_fast.data.foreign.bounds import CUT, STEP_TYPE, Marks, check_single, episode_rows
from aime_fast.data.foreign.episode import NEXT, Episode, Names, build, readable
from aime_fast.data.foreign.pictures import decoded
from aime_fast.errors import DataError

DONE = ("dones", "done")  # true where a task ends, and in some programs also where an episode is cut off


class Columns(NamedTuple):
    """What is what in a group, or in a file."""

    group: h5py.Group
    where: str
    present: list[str]
    names: Names  # without `NEXT`; `leads` is known
    chosen: dict[str, str]  # as in `episode.KNOWN`
    following: frozenset[str]  # what is taken from the following row

    def marks(self) -> Marks:
        return Marks(self.where, self.present, self.names, self.values, self.group[self.chosen["pixels"]].shape[0])

    def values(self, name: str, where: str | None = None, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a column. Raises DataError, with the place and its name, where they cannot be read."""
        place = f"{where or self.where}: {name}"
        with readable(place):
            _find_filters(self.group[name], place)
            return self.group[name][rows]


def read(source: Path, names: Names) -> Iterator[Episode]:
    """Episodes of the files of a folder, by name; or of one file. Raises DataError where one is damaged or lacks something."""
    paths = [source] if source.is_file() else sorted(path for end in ("*.h5", "*.hdf5") for path in source.rglob(end))
    for path in paths:
        with readable(str(path)), h5py.File(path, "r") as file:
            groups = _groups(file)
            for group in groups:
                columns = _columns(group, names, f"{path}: {group.name}")
                check_single(columns.marks())
                yield _episode(columns, columns.where)
            if not groups:
                yield from _cut(_columns(file, names, str(path)))


def _groups(file: h5py.File) -> list[h5py.Group]:
    """Groups of one name and a number each, in this order, at the top or in a single group there."""
    places = [file, *(item for item in file.values() if isinstance(item, h5py.Group))]
    for place in places:
        numbered = [(name.rstrip("0123456789"), name) for name, item in place.items() if isinstance(item, h5py.Group)]
        found = [(int(name[len(stem) :]), name) for stem, name in numbered if name != stem]
        if found and len({stem for stem, name in numbered if name != stem}) == 1:
            return [place[name] for _, name in sorted(found)]
    return []


def _columns(group: h5py.Group, names: Names, where: str) -> Columns:
    present: list[str] = []
    group.visititems(lambda name, item: present.append(name) if isinstance(item, h5py.Dataset) and item.shape else None)
    leads = STEP_TYPE in present if names.leads is None else names.leads
    plain, following = names._replace(leads=leads).following(present)
    return Columns(group, where, present, plain, plain.choose(present, where), following)


def _cut(columns: Columns) -> Iterator[Episode]:
    """Episodes of columns that hold all of them."""
    marks = columns.marks()
    spans = episode_rows(marks)
    for name in columns.chosen.values():
        if (found := columns.group[name].shape[0]) != marks.rows and len(spans) > 1:
            raise DataError(f"{columns.where}: {name} has {found} rows, pixels have {marks.rows}; expected as many")
    for number, (begin, end) in enumerate(spans):
        yield _episode(columns, f"{columns.where}: episode {number}, rows {begin} to {end}", slice(begin, end))


def _episode(columns: Columns, where: str, rows: slice = slice(None)) -> Episode:
    chosen, given, leads = columns.chosen, columns.names.given, bool(columns.names.leads)
    arrays = {what: columns.values(name, where, rows) for what, name in chosen.items() if what != "first"}
    arrays["pixels"] = _pictures(where, arrays["pixels"], columns.names.image_size)
    if chosen.get("terminal") in DONE and "terminal" not in given:
        for cut in (columns.values(name, where, rows) for name in CUT if name in columns.present):
            arrays["terminal"] = np.where(cut.reshape(arrays["terminal"].shape), 0, arrays["terminal"])
    if "action" in arrays and not leads:
        action = arrays["action"]
        if len(action) == len(arrays["pixels"]) and action.dtype.kind == "f" and np.isnan(action[-1:]).all():
            arrays["action"] = action = action[:-1]
        if len(action) + 1 == len(arrays.get("reward", ())) == len(arrays["pixels"]) and "reward" not in given:
            name = chosen["reward"]
            raise DataError(
                f"{where}: {len(action) + 1} {name}, {len(action)} actions; where a reward lies with the picture that it came with pass "
                f"--map reward={NEXT}{name}, where it lies with the action that brought it --map reward={name}"
            )
    return build(where, arrays, leads, columns.following)


def _pictures(where: str, pixels: np.ndarray, size: int | None) -> np.ndarray:
    """Decoded where each is a file in bytes, as Minari stores JPEG: object [T], or uint8 [T, N] where all happen to be of one length."""
    coded = (pixels.dtype == object and pixels.ndim == 1) or (pixels.dtype == np.uint8 and pixels.ndim == 2)
    return decoded(where, [bytes(part) for part in pixels], size) if coded else pixels


def _find_filters(column: h5py.Dataset, where: str) -> None:
    """Loads `hdf5plugin` for a column that is compressed with what h5py lacks. Raises DataError where that does not help."""
    properties = column.id.get_create_plist()
    filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    if all(h5py.h5z.filter_avail(code) for code, *_ in filters):
        return
    with suppress(ImportError):
        import_module("hdf5plugin")
    if lacking := [f"{name.decode() or 'unnamed'} ({code})" for code, *_, name in filters if not h5py.h5z.filter_avail(code)]:
        raise DataError(f"{where}: compressed with {', '.join(lacking)}, which h5py lacks; pip install hdf5plugin")
