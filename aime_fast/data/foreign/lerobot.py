"""LeRobot data sets, v2.0, v2.1 and v3: rows in parquet files, pictures in these or in mp4 films.

By huggingface/lerobot (src/lerobot/datasets: utils.py, dataset_metadata.py, dataset_writer.py, dataset_reader.py):
meta/info.json has `codebase_version`, `fps`, `features` (name -> dtype, shape) and where files are, `data_path` and `video_path`.
v2: a parquet file and a film an episode, numbered in meta/episodes.jsonl, `chunks_size` of them a folder. v3: many episodes a file;
meta/episodes/*/*.parquet says in which ones an episode lies, and at which second of a film it begins (`videos/KEY/from_timestamp`).
Frame t of an episode is that at `from_timestamp` + t / `fps`. A feature of dtype `image` is a column of {bytes, path}.
In row t lie picture t, the `action` taken after it, and `next.reward` and `next.done`, which that brought.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aime_fast.data.foreign import videos
from aime_fast.data.foreign.episode import Episode, Names, build, optional, readable
from aime_fast.data.foreign.pictures import decoded, gathered
from aime_fast.errors import DataError

INFO = "meta/info.json"
BATCH = 256  # rows that are decoded together
EPISODE, FRAME = "episode_index", "frame_index"
AGAIN = "copy the data set again"


class Entry(NamedTuple):
    """Where an episode lies."""

    number: int
    length: int  # rows
    rows: Path  # parquet file
    film: Path | None  # None: pictures lie in the rows
    begin: float  # of the episode in the film, seconds


class Dataset(NamedTuple):
    """What meta/info.json says, and what is chosen of it."""

    folder: Path
    info: Mapping[str, Any]
    version: int  # 2 or 3
    camera: str
    columns: dict[str, str]  # action and perhaps reward, discount, terminal -> column
    size: int | None  # of pictures, see `Names`

    @property
    def filmed(self) -> bool:
        return self.info["features"][self.camera]["dtype"] == "video"

    def path(self, template: str, **values: object) -> Path:
        """A file, where `data_path` or `video_path` of meta/info.json puts it."""
        with readable(f"{self.folder / INFO}: {template}"):
            return self.folder / self.info[template].format(**values)


def is_dataset(source: Path) -> bool:
    """Whether a folder is laid out as LeRobot does, even where meta/info.json is missing."""
    return (source / INFO).is_file() or any(source.glob("data/chunk-*/*.parquet"))


def read(source: Path, names: Names) -> Iterator[Episode]:
    """Episodes of a data set in their order, one at a time. Raises DataError where it is damaged or lacks something."""
    data = _dataset(source, names)
    entries = (_numbered if data.version == 2 else _packed)(data)
    if len(entries) != data.info.get("total_episodes", len(entries)):
        raise DataError(f"{source}: {len(entries)} episodes in meta, {INFO} says {data.info['total_episodes']}; {AGAIN}")
    for path, group in groupby(entries, key=lambda entry: entry.rows):
        tables = _tables(path, [*data.columns.values(), *([] if data.filmed else [data.camera])])
        for entry in group:
            where = f"{path}: episode {entry.number}"
            with readable(where):
                table = next((table for number, table in tables if number == entry.number), None)
                arrays = _arrays(where, data, entry, table)
            yield build(where, arrays, leads=bool(names.leads))


def _dataset(source: Path, names: Names) -> Dataset:
    path = source / INFO
    if not path.is_file():
        raise DataError(f"{path}: missing; give the folder of a LeRobot data set of v2 or v3, with meta, data and perhaps videos in it")
    with readable(str(path)):
        info = json.loads(path.read_text())
        if absent := [key for key in ("codebase_version", "fps", "features", "data_path") if key not in info]:
            raise DataError(f"{path}: no {', '.join(absent)} in it; {AGAIN}")
        version = re.match(r"v?(\d+)(\.|$)", str(info["codebase_version"]))
        if version is None or version[1] not in ("2", "3"):
            raise DataError(f"{path}: codebase_version {info['codebase_version']}, expected v2.0 to v3; bring it there with LeRobot")
        if info.get("storage_format", "parquet") != "parquet":
            raise DataError(f"{path}: storage_format {info['storage_format']}, expected parquet; bring it there with LeRobot")
        cameras = {name: feature for name, feature in info["features"].items() if feature["dtype"] in ("image", "video")}
        others = [name for name in info["features"] if name not in cameras]
        found = {what: names.find(what, others, str(path), what == "action") for what in ("action", "reward", "discount", "terminal")}
        columns = {what: name for what, name in found.items() if name is not None}
        return Dataset(source, info, int(version[1]), _camera(cameras, names, str(path)), columns, names.image_size)


def _camera(cameras: Mapping[str, Any], names: Names, where: str) -> str:
    """The one that `--map` names, or the only one that records no depths."""
    if given := names.given.get("pixels"):
        if given not in cameras:
            raise DataError(f"{where}: --map pixels={given}: there are {', '.join(cameras) or 'no cameras'}")
        return given
    colour = [name for name, feature in cameras.items() if not _is_depth(feature)]
    if len(colour) != 1:
        what = f"{len(colour)} cameras, {', '.join(colour)}; choose one with --map pixels=NAME" if colour else "no camera in its features"
        raise DataError(f"{where}: {what}")
    return colour[0]


def _is_depth(feature: Mapping[str, Any]) -> bool:
    notes = (feature.get("info") or {}) | (feature.get("video_info") or {})
    return bool(notes.get("is_depth_map") or notes.get("video.is_depth_map"))


def _numbered(data: Dataset) -> list[Entry]:
    """Episodes of v2."""
    path = data.folder / "meta" / "episodes.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: missing; {AGAIN}")
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        with readable(f"{path}: line {number}"):
            episode = json.loads(line)
            _check(list(episode), (EPISODE, "length"), f"{path}: line {number}")
            index = int(episode[EPISODE])
            of = {EPISODE: index, "episode_chunk": index // data.info.get("chunks_size", 1000)}
            rows = data.path("data_path", **of, total_episodes=data.info.get("total_episodes"))
            film = data.path("video_path", **of, video_key=data.camera) if data.filmed else None
            entries.append(Entry(index, int(episode["length"]), rows, film, 0.0))
    return sorted(entries)


def _packed(data: Dataset) -> list[Entry]:
    """Episodes of v3, in the order of their rows."""
    folder = data.folder / "meta" / "episodes"
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise DataError(f"{folder}: no parquet file in it; {AGAIN}")
    parquet = optional("pyarrow.parquet", str(data.folder), "lerobot")
    place = ["chunk_index", "file_index"]
    needed = [EPISODE, "length", "dataset_from_index", *(f"data/{key}" for key in place)]
    if data.filmed:
        needed += [f"videos/{data.camera}/{key}" for key in (*place, "from_timestamp")]
    found = []
    for path in files:
        with readable(str(path)), parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _check(file.schema_arrow.names, needed, str(path))
            for row in file.read(columns=needed).to_pylist():
                if empty := [key for key in needed if row[key] is None]:
                    raise DataError(f"{path}: episode {row[EPISODE]}: no {', '.join(empty)}; {AGAIN}")
                rows = data.path("data_path", **{key: row[f"data/{key}"] for key in place})
                film, begin = None, 0.0
                if data.filmed:
                    of = {key: row[f"videos/{data.camera}/{key}"] for key in place}
                    film, begin = data.path("video_path", **of, video_key=data.camera), row[f"videos/{data.camera}/from_timestamp"]
                found.append((row["dataset_from_index"], Entry(row[EPISODE], row["length"], rows, film, begin)))
    return [entry for _, entry in sorted(found)]


def _check(present: Sequence[str], needed: Sequence[str], where: str) -> None:
    if absent := [name for name in needed if name not in present]:
        raise DataError(f"{where}: no {', '.join(absent)}; there are {', '.join(present)}; {AGAIN}")


def _tables(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Episodes of a parquet file in its order, (number, table of its rows); read in small parts."""
    if not path.is_file():
        raise DataError(f"{path}: missing; {AGAIN}")
    arrow, parquet = (optional(module, str(path), "lerobot") for module in ("pyarrow", "pyarrow.parquet"))
    needed = list(dict.fromkeys([EPISODE, FRAME, *columns]))
    with readable(str(path)), parquet.ParquetFile(path, page_checksum_verification=True) as file:
        _check(file.schema_arrow.names, needed, str(path))
        held, current = [], -1
        for batch in file.iter_batches(BATCH, columns=needed):
            numbers = batch.column(EPISODE).to_numpy(zero_copy_only=False)
            for begin, end in pairwise([0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]):
                if held and numbers[begin] != current:
                    yield current, arrow.Table.from_batches(held)
                    held = []
                current = int(numbers[begin])
                held.append(batch.slice(begin, end - begin))
        if held:
            yield current, arrow.Table.from_batches(held)


def _arrays(where: str, data: Dataset, entry: Entry, table: Any) -> dict[str, np.ndarray]:
    """Arrays of an episode for `build`. Raises DataError where rows or frames are missing, or not as meta/info.json says."""
    steps = 0 if table is None else table.num_rows
    if steps != entry.length:
        raise DataError(f"{where}: {steps} rows, meta says {entry.length}; {AGAIN}")
    rows = table.column(FRAME).to_pylist()
    if off := next(((t, row) for t, row in enumerate(rows) if t != row), None):
        raise DataError(f"{where}: row {off[0]} has {FRAME} {off[1]}, expected {off[0]}; {AGAIN}")
    features = data.info["features"]
    arrays = {what: _numbers(f"{where}: {name}", table.column(name), features[name]) for what, name in data.columns.items()}
    if entry.film is None:
        coded = [_bytes(cell, data.folder, f"{where}: {data.camera} of row {t}") for t, cell in enumerate(table.column(data.camera))]
        return arrays | {"pixels": decoded(f"{where}: {data.camera}", coded, data.size)}
    return arrays | {"pixels": _film(where, entry, float(data.info["fps"]), data.size)}


def _numbers(where: str, column: Any, feature: Mapping[str, Any]) -> np.ndarray:
    """[T], or [T, *shape]."""
    expected = [] if (shape := list(feature["shape"])) == [1] else shape
    rows = column.to_pylist()
    for t, row in enumerate(rows):
        values = np.array(row)
        if values.dtype.kind not in "fiub":
            raise DataError(f"{where}: row {t} is {str(row)[:60]}, expected numbers of shape {shape}; choose another with --map")
        if list(values.shape) not in (expected, shape):
            raise DataError(f"{where}: row {t} has shape {list(values.shape)}, {INFO} says {shape}; {AGAIN}")
    return np.array(rows)


def _bytes(cell: Any, folder: Path, where: str) -> bytes:
    """Of a picture's file, which lies in the cell or is named there."""
    held = found if isinstance(found := cell.as_py(), dict) else {"bytes": found}
    if held.get("bytes") is None and held.get("path"):
        with readable(where):
            return (folder / held["path"]).read_bytes()
    if not isinstance(held.get("bytes"), bytes):
        raise DataError(f"{where}: {str(held)[:60]}, expected a picture's bytes or path; {AGAIN}")
    return held["bytes"]


def _film(where: str, entry: Entry, rate: float, size: int | None) -> np.ndarray:
    """Frames of an episode in its film, uint8 [T, h, w, 3], or squares of a size; one for each row, `rate` a second."""
    steps, path = entry.length, entry.film
    if not path.is_file():
        raise DataError(f"{where}: its film {path} is missing; {AGAIN}")
    begin = max(entry.begin - 0.5 / rate, 0.0)  # between two frames, so that rounded times choose the same
    film = videos.Film(path, begin, entry.begin + (steps - 0.5) / rate - begin)
    with readable(f"{where}: its film {path}"):
        pixels = gathered(((f"{where}: its film {path}: picture {t}", frame) for t, frame in enumerate(film)), size, steps)
    if film.frames != steps:
        reason = f" ({film.fault})" if film.fault else ""
        found = f"{film.frames} frames can be read in {path} from second {entry.begin:g}{reason}"
        raise DataError(f"{where}: {found}, expected {steps}, {rate:g} a second; {AGAIN}")
    return pixels
