"""Episodes as NumPy archives, a file each: the Dreamer family, V-D4RL. There an action led to the picture of its row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aime_fast.data.foreign.episode import Episode, Names, build, readable
from aime_fast.errors import DataError


def read(source: Path, names: Names) -> Iterator[Episode]:
    """The archives of a folder and of those in it, by name; or one archive."""
    for path in [source] if source.is_file() else sorted(source.rglob("*.npz")):
        with readable(str(path)), np.load(path, allow_pickle=False) as file:
            arrays = {what: file[name] for what, name in names.choose(file.files, str(path)).items()}
        firsts = np.flatnonzero(np.asarray(arrays.pop("first", [])))
        if len(firsts) and firsts.tolist() != [0]:
            raise DataError(f"{path}: is_first at rows {firsts.tolist()}, expected one episode a file, beginning at row 0")
        yield build(str(path), arrays, leads=names.leads is not False)
