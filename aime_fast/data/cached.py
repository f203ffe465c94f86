"""Recordings of other programs that are converted when they are first opened."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from aime_fast.config import DataConfig
from aime_fast.data.conversion import Recipe, convert, file_attributes
from aime_fast.data.foreign import Names, detect, read
from aime_fast.data.foreign.rlds import as_dmc_vb, subset
from aime_fast.runtime.files import open_locked

OPENED = ("rlds",)  # formats that need no settings


def cache_folder() -> Path:
    """Where converted files are kept: `aime_fast` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "aime_fast"


def converted(folder: Path, image_size: int | None) -> Path | None:
    """The HDF5 file of a folder in a format of `OPENED`, converted unless it was before; None for other folders.

    A folder whose files have changed since is converted anew. Raises DataError as `convert`.
    """
    if not any(folder.rglob("*.tfrecord*")) or (form := detect(folder)) not in OPENED:
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = image_size or DataConfig.image_size
    known = [str(folder.resolve()), size, *((path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in files)]
    out = cache_folder() / f"{folder.name}-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.h5"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        lock, _ = open_locked(out.with_suffix(".lock"))  # waits for another process that converts the same
        try:
            if not out.exists():
                _convert(folder, form, out, size)
        finally:
            out.with_suffix(".lock").unlink(missing_ok=True)
            lock.close()
    return out


def _convert(folder: Path, form: str, out: Path, size: int) -> None:
    print(f"{folder}: converting it into {out}", flush=True)
    names, recipe = as_dmc_vb(folder, Names(image_size=size)), Recipe(size)
    attributes = file_attributes(folder, form, recipe, "converted", subset(folder) or folder.name, reading=names.given)
    convert(read(folder, form, names), folder, out, attributes, recipe, resume=True)
