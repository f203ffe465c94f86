"""`EpisodeWriter`: a shard that is whole and verified, or is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from aime_fast.data.checksums import episode_sha256
from aime_fast.data.episodes import (
    CHUNK_FRAMES,
    FORMAT_VERSION,
    LIBVER,
    OMITTED,
    SHARED,
    check_episode,
    check_shard,
    dtypes,
    file_sha256,
    open_shard,
    read_attributes,
    to_python,
)
from aime_fast.data.files import PartFile, writable_target
from aime_fast.errors import DataError

PIXELS = {"compression": "gzip", "compression_opts": 1}  # every h5py reads it; others: `python -m profiling.bench codecs`


def of_fixed_length(value: Any) -> Any:
    """Text, or a list of texts, as an array that HDF5 stores within its metadata, under a checksum; other values as they are.

    Strings of variable length lie in a heap without checksum, and one wrong bit there can make HDF5 loop for ever.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        return value
    encoded = [text.encode() for text in texts]
    array = np.array(encoded, dtype=h5py.string_dtype("utf-8", max(1, *map(len, encoded))))
    return array[0] if isinstance(value, str) else array


class EpisodeWriter:
    """Writes a shard episode by episode to a temporary file in the same folder.

    Use it as a context manager. A normal exit checks the file and gives it its final name; an exception, or an exit without episodes,
    deletes it. So a file under the final name is always complete, and what failed to reach the disk is noticed after each data set.

    Args:
        path: final name; its folder is created. A symbolic link is followed.
        attributes: file attributes; every key of `SHARED` must be among them, but those of `OMITTED`.
    Raises:
        DataError: the attributes are incomplete, the path is not one of a regular file, or the file cannot be written.
    """

    def __init__(self, path: str | Path, attributes: Mapping[str, Any]):
        attributes = OMITTED | dict(attributes)
        if missing := sorted(set(SHARED) - set(attributes)):
            raise DataError(f"{path}: attributes {', '.join(missing)} are not given; an episode file must name them")
        self.path = writable_target(path)
        self.episodes = 0
        self._part = PartFile(self.path)
        self._file = h5py.File(self._part, "w", libver=LIBVER)
        self.annotate(**{**attributes, "format_version": FORMAT_VERSION, "complete": False})

    def write(self, episode: Mapping[str, np.ndarray]) -> None:
        """Append an episode: arrays with the names, dtypes and shapes of the module's table. Raises DataError if one differs."""
        name = self._next_name()
        group = self._file.create_group(name)
        arrays: dict[str, np.ndarray] = {}
        for key, dtype in dtypes(episode).items():
            value = arrays[key] = np.asarray(episode.get(key))
            if value.dtype != dtype or value.ndim == 0 or len(value) == 0:
                raise DataError(
                    f"{self.path}: dataset '{name}/{key}' would be {value.dtype} {list(value.shape)}, expected {np.dtype(dtype)} [T, ...]; "
                    f"pass the arrays that `aime_fast.data.episodes` describes"
                )
            options = {"fletcher32": True}
            if key == "pixels":
                options |= {"chunks": (min(CHUNK_FRAMES, len(value)), *value.shape[1:]), **PIXELS}
            with self._failures_noticed():
                group.create_dataset(key, data=value, **options).flush()
        with self._failures_noticed():
            group.attrs["sha256"] = of_fixed_length(episode_sha256(arrays))
        check_episode(group, self.path, self._file.attrs)
        self.episodes += 1

    def copy(self, shard: str | Path) -> dict[str, Any]:
        """Append all episodes of another shard as they are stored, without decompressing them; returns the attributes of that shard.

        Raises DataError if it is damaged or has other settings.
        """
        with open_shard(shard) as file:
            attributes = read_attributes(file, shard)
            for name in check_shard(file, shard, attributes, {key: to_python(self._file.attrs[key]) for key in SHARED}):
                with self._failures_noticed():
                    file.copy(name, self._file, self._next_name())
                    self._file.flush()
                self.episodes += 1
        return attributes

    def annotate(self, **attributes: Any) -> None:
        """Add attributes that are known only after recording."""
        with self._failures_noticed():
            for name, value in attributes.items():
                self._file.attrs[name] = of_fixed_length(value)

    def _next_name(self) -> str:
        return f"episode_{self.episodes:05d}"

    @contextlib.contextmanager
    def _failures_noticed(self):
        """Raise DataError if a write has failed, also where HDF5 raises because of it."""
        try:
            yield
        except Exception:
            self._part.check()
            raise
        self._part.check()

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and self.episodes:
                self._finish()
        finally:
            with contextlib.suppress(Exception):  # after a failed write HDF5 may fail to close, and the first error is what counts
                self._file.close()
            self._part.discard()

    def _finish(self) -> None:
        self.annotate(complete=True)
        attributes = {key: to_python(value) for key, value in self._file.attrs.items()}
        self.annotate(attributes_sha256=file_sha256(self._file, self.path, attributes))
        with self._failures_noticed():
            self._file.close()
        with h5py.File(self._part, "r") as file:
            check_shard(file, self.path, read_attributes(file, self.path), {})
        self._part.finish()
