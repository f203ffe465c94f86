"""Films (mp4 and so on) or folders of pictures, an episode each, with actions beside them: NAME.npy or NAME.csv, rows of T actions.

Rewards may lie in NAME.reward.npy or NAME.reward.csv. `--map action=none`: no actions are known, A = 1 and zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from aime_fast.data.foreign.episode import Episode, Names, build, readable
from aime_fast.errors import DataError

FILMS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif")
PICTURES = (".png", ".jpg", ".jpeg")
NONE = "none"


def read(source: Path, names: Names) -> Iterator[Episode]:
    """The films of a folder, or the folders in it that hold pictures; or one of them."""
    films = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.suffix.lower() in FILMS)
    folders = [] if source.is_file() else sorted({path.parent for path in source.rglob("*") if path.suffix.lower() in PICTURES})
    if not films and not folders:
        raise DataError(f"{source}: neither a film ({', '.join(FILMS)}) nor a folder of pictures ({', '.join(PICTURES)})")
    for path in [*films, *folders]:
        with readable(str(path)):
            pixels = _film(path) if path.is_file() else _pictures(path)
            arrays = {"pixels": pixels, "action": _actions(path, names, len(pixels))}
            reward = _table(path, ".reward")
            if reward is not None:
                arrays["reward"] = reward
        yield build(str(path), arrays, leads=bool(names.leads))


def frames(path: Path, begin: float = 0.0, seconds: float | None = None) -> Iterator[np.ndarray]:
    """Frames of a film, uint8 [h, w, 3], decoded one at a time. Raises what imageio_ffmpeg raises for what is no film.

    With `seconds` they are those of a part from `begin`, none added or left out to even out the rate, and end where one is damaged.
    """
    import imageio_ffmpeg

    part, rate = [], []
    if seconds is not None:
        part = ["-err_detect", "explode", "-xerror", "-ss", f"{begin:.6f}", "-t", f"{seconds:.6f}"]
        rate = ["-fps_mode", "passthrough"]
    found = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24", input_params=part, output_params=rate)
    width, height = next(found)["size"]
    for frame in found:
        yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)


def _film(path: Path) -> np.ndarray:
    found = list(frames(path))
    if not found:
        raise DataError(f"{path}: no frame can be read; copy it again, or leave it out")
    return np.stack(found)


def _pictures(folder: Path) -> np.ndarray:
    from PIL import Image

    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in files]
    if other := next((path for path, picture in zip(files, pictures) if picture.shape != pictures[0].shape), None):
        raise DataError(f"{other}: another size than {files[0].name}; the pictures of an episode must be alike")
    return np.stack(pictures)


def _actions(path: Path, names: Names, frames: int) -> np.ndarray:
    if names.given.get("action") == NONE:
        return np.zeros((frames, 1), np.float32)
    found = _table(path)
    if found is None:
        raise DataError(f"{path}: no actions beside it, expected {path.stem}.npy or {path.stem}.csv; without any pass --map action=none")
    return found


def _table(path: Path, what: str = "") -> np.ndarray | None:
    """Rows of numbers of `<name><what>.npy` or `.csv` beside a film or folder, or None."""
    for file in (path.with_name(f"{path.stem}{what}.npy"), path.with_name(f"{path.stem}{what}.csv")):
        if file.exists():
            with readable(str(file)):
                return np.load(file, allow_pickle=False) if file.suffix == ".npy" else np.loadtxt(file, delimiter=",", ndmin=2)
    return None
