"""Recordings of other programs, read episode by episode: one module a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from aime_fast.data.foreign import hdf5, lerobot, minari, npz, rlds, videos
from aime_fast.data.foreign.episode import Episode, Names
from aime_fast.errors import ConfigError, DataError

__all__ = ["READERS", "Episode", "Names", "detect", "read"]

# Each: a source and the names of what is in it -> its episodes, one at a time.
READERS: dict[str, Callable[[Path, Names], Iterator[Episode]]] = {
    "npz": npz.read,
    "hdf5": hdf5.read,
    "videos": videos.read,
    "rlds": rlds.read,
    "lerobot": lerobot.read,
    "minari": minari.read,
}
SUFFIXES = {
    ".npz": "npz",
    ".tfrecord": "rlds",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    **dict.fromkeys((*videos.FILMS, *videos.PICTURES), "videos"),
}


def detect(source: Path) -> str:
    """The format of a file or of the files of a folder, by their names, or by what is beside them. Raises DataError."""
    if not source.exists():
        raise DataError(f"{source}: there is no such file or folder; give the recording to convert")
    if lerobot.is_dataset(source):
        return "lerobot"
    if minari.data_folder(source):
        return "minari"
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    suffixes = {".tfrecord" if ".tfrecord" in path.name else path.suffix.lower() for path in files}  # shards: .tfrecord-00000-of-00002
    found = {SUFFIXES[suffix] for suffix in suffixes if suffix in SUFFIXES}
    if len(found) != 1:
        what = f"files of {' and '.join(sorted(found))}" if found else "no file of a known format"
        raise DataError(f"{source}: {what}; say which with --format {'|'.join(READERS)}, or give a part of the folder")
    return found.pop()


def read(source: Path, form: str, names: Names) -> Iterator[Episode]:
    """Episodes of a source. Raises DataError where it is damaged or lacks something, ConfigError for what `names` has that is unknown."""
    names.check()
    if form not in READERS:
        raise ConfigError(f"--format {form}: expected auto, {', '.join(READERS)}")
    return READERS[form](source, names)
