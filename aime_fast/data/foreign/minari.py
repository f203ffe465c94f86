"""Minari data sets: one HDF5 file with a group an episode, or a folder an episode with Arrow or parquet files.

By Farama-Foundation/Minari, minari/dataset/minari_storage.py and _storages/{hdf5,arrow}_storage.py: data/metadata.json has `data_format`,
`total_episodes` and the spaces. An episode has one more observation than `actions`, `rewards`, `terminations` and `truncations`; Arrow and
parquet add a meaningless row to these. Observations may be nested (`observations/pixels`). Pictures of 32 x 32 and more are JPEG, unless
`jpeg_encoding` is false; in Arrow the others are flat, and their shape is that of the space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aime_fast.data.foreign import hdf5
from aime_fast.data.foreign.episode import Episode, Names, build, optional, readable
from aime_fast.data.foreign.pictures import decoded
from aime_fast.errors import DataError

MAIN = "main_data.hdf5"
METADATA = "metadata.json"
OBSERVATIONS = "observations"
AGAIN = "copy the data set again"


def data_folder(source: Path) -> Path | None:
    """The folder `data` of a data set, given that of the data set, `data` or the HDF5 file; None: it is none of Minari."""
    for folder in (source.parent,) if source.is_file() and source.name == MAIN else (source / "data", source):
        if (folder / MAIN).is_file():
            return folder
        if (folder / METADATA).is_file():
            with readable(str(folder / METADATA)):
                if "data_format" in json.loads((folder / METADATA).read_text()):
                    return folder
    return None


def read(source: Path, names: Names) -> Iterator[Episode]:
    """Episodes of a data set by number, one at a time. Raises DataError where it is damaged or lacks something."""
    folder = data_folder(source)
    if folder is None:
        raise DataError(f"{source}: neither {MAIN} nor a {METADATA} of Minari in it or in its folder data; give the folder of one data set")
    metadata: dict[str, Any] = {}
    if (folder / METADATA).is_file():  # before 0.5 it lay in the HDF5 file
        with readable(str(folder / METADATA)):
            metadata = json.loads((folder / METADATA).read_text())
    form, expected = metadata.get("data_format", "hdf5"), metadata.get("total_episodes")
    if form not in ("hdf5", "arrow", "parquet"):
        raise DataError(f"{folder / METADATA}: data_format {form}, expected hdf5, arrow or parquet; write it anew with Minari")
    if form == "hdf5" and not (folder / MAIN).is_file():
        raise DataError(f"{folder / MAIN}: missing; {AGAIN}")
    if form != "hdf5" and expected is None:
        raise DataError(f"{folder / METADATA}: no total_episodes in it; {AGAIN}")
    count = 0
    for episode in hdf5.read(folder / MAIN, names) if form == "hdf5" else _folders(folder, form, metadata, names):
        yield episode
        count += 1
    if expected not in (None, count):
        raise DataError(f"{folder}: {count} episodes, {METADATA} says {expected}; {AGAIN}")


def _folders(folder: Path, form: str, metadata: Mapping[str, Any], names: Names) -> Iterator[Episode]:
    """Episodes of Arrow or parquet files."""
    for number in range(metadata["total_episodes"]):
        where = str(folder / str(number))
        parts = sorted((folder / str(number)).glob(f"*.{form}"))
        if not parts:
            raise DataError(f"{where}: no {form} file in it, {METADATA} says {metadata['total_episodes']} episodes; {AGAIN}")
        with readable(where):
            columns = dict(_columns(parts, form))
            chosen = names.choose(list(columns), where)
            arrays = {what: _array(f"{where}: {name}", columns[name], _shape(metadata, name)) for what, name in chosen.items()}
            for what in arrays.keys() - {"pixels"}:
                arrays[what] = arrays[what][:-1]
        yield build(where, arrays, leads=bool(names.leads))


def _columns(parts: list[Path], form: str) -> Iterator[tuple[str, Any]]:
    """(name, Arrow array) of what an episode's files hold; of a nested column its parts, as `observations/pixels`."""
    where = str(parts[0].parent)
    arrow, parquet, ipc = (optional(name, where, "minari") for name in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"))
    tables = []
    for path in parts:
        with readable(str(path)):
            if form == "parquet":
                with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                    tables.append(file.read())
            else:
                with arrow.OSFile(str(path)) as file:
                    tables.append(ipc.open_file(file).read_all())
    table = arrow.concat_tables(tables)
    for name in table.column_names:
        yield from _flattened(name, arrow.concat_arrays(table.column(name).chunks))


def _flattened(name: str, array: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(array, "field"):  # a StructArray
        for i, field in enumerate(array.type):
            yield from _flattened(f"{name}/{field.name}", array.field(i))
    else:
        yield name, array


def _shape(metadata: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Of one observation by its space; (-1,) for other columns, and where the space is not recorded."""
    first, *rest = name.split("/")
    if first != OBSERVATIONS or "observation_space" not in metadata:
        return (-1,)
    space = json.loads(metadata["observation_space"])
    for key in rest:
        inner = space["subspaces"]
        space = inner[int(key)] if isinstance(inner, list) else inner[key]
    return tuple(space["shape"])


def _array(where: str, column: Any, shape: tuple[int, ...]) -> np.ndarray:
    """[T], or [T, *shape] of lists."""
    kind = str(column.type)
    if column.null_count:
        raise DataError(f"{where}: {column.null_count} of {len(column)} rows are empty; {AGAIN}")
    if kind in ("binary", "large_binary"):
        return decoded(where, column.to_pylist())
    if not kind.startswith("fixed_size_list"):
        return column.to_numpy(zero_copy_only=False)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    width = len(flat) // max(len(column), 1)
    if shape != (-1,) and width != np.prod(shape):
        raise DataError(f"{where}: {width} numbers a row, {METADATA} says {list(shape)}; {AGAIN}")
    return flat.reshape(len(column), *shape)
