"""Recordings of other programs that are converted when they are first opened."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from aime_fast.config import DataConfig
from aime_fast.data.conversion import Recipe, convert, file_attributes
from aime_fast.data.foreign import Names, detect, read
from aime_fast.data.foreign.rlds import RewardsUnclear

OPENED = ("rlds",)  # formats that need no settings


def cache_folder() -> Path:
    """Where converted files are kept: `aime_fast` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aime_fast"


def converted(folder: Path, image_size: int | None) -> Path | None:
    """The HDF5 file of a folder in a format of `OPENED`, converted unless it was before; None for other folders.

    A folder whose files have changed since is converted anew. Raises DataError as `convert`.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not any(".tfrecord" in path.name for path in files) or (form := detect(folder)) not in OPENED:
        return None
    size = image_size or DataConfig.image_size
    known = [str(folder.resolve()), size, *((path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in files)]
    out = cache_folder() / f"{folder.name}-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.h5"
    if not out.exists():
        print(f"{folder}: converting it into {out}", flush=True)
        try:
            _convert(folder, form, Names(image_size=size), out, Recipe(size))
        except RewardsUnclear:  # as DMC-VB's own loader takes them
            _convert(folder, form, Names({"reward": "next/reward"}, image_size=size), out, Recipe(size))
    return out


def _convert(folder: Path, form: str, names: Names, out: Path, recipe: Recipe) -> None:
    attributes = file_attributes(folder, form, recipe, "converted", folder.name, reading=names.given)
    convert(read(folder, form, names), out, attributes, recipe, resume=True)
