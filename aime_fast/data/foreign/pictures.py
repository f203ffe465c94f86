"""Pictures of recordings: decoded, and brought to a square as they are read, so that a long film of large pictures fits into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from aime_fast.data.foreign.episode import readable
from aime_fast.errors import DataError

ROOM = 64  # pictures that memory is first reserved for; doubled when these are full


def square(picture: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 [h, w, 3] -> [size, size, 3]: the middle square, by area; a smaller one is enlarged linearly. None: as it is."""
    from PIL import Image

    height, width = picture.shape[:2]
    if size is None or (height, width) == (size, size):
        return picture
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    box, how = (left, top, left + side, top + side), Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize((size, size), how, box))


def gathered(pictures: Iterable[tuple[str, np.ndarray]], size: int | None = None, most: int | None = None) -> np.ndarray:
    """Pictures that come one at a time, (where, uint8 [h, w, 3]): uint8 [T, h, w, 3], or `square` ones of a size.

    One picture of its original size is held at a time. Those after `most` are left out. Raises DataError for one of another original
    size than the first. [0, 0, 0, 3] where there is none.
    """
    shape: tuple[int, ...] | None = None
    held, count = np.empty((0, 0, 0, 3), np.uint8), 0
    for where, picture in pictures:
        shape = shape or picture.shape
        if picture.shape != shape:
            raise DataError(f"{where} is {list(picture.shape)}, the first {list(shape)}; they must be alike")
        if count == most:
            continue
        picture = square(picture, size)
        if not count:
            held = np.empty((min(ROOM, most or ROOM), *picture.shape), np.uint8)
        if count == len(held):
            held.resize((min(2 * count, most or 2 * count), *picture.shape), refcheck=False)  # in place; no view of it exists
        held[count] = picture
        count += 1
    held.resize((count, *held.shape[1:]), refcheck=False)
    return held


def decoded(where: str, coded: Sequence[bytes], size: int | None = None) -> np.ndarray:
    """Pictures of files in memory, such as PNG or JPEG, as `gathered`.

    Raises DataError for one that is damaged, or of another size than the first.
    """

    def pictures() -> Iterator[tuple[str, np.ndarray]]:
        for t, part in enumerate(coded):
            place = f"{where}: picture {t}"
            yield place, _opened(place, BytesIO(part))

    return gathered(pictures(), size, len(coded))


def opened(files: Sequence[Path], size: int | None = None) -> np.ndarray:
    """Pictures of files, as `gathered`. Raises DataError for one that is damaged, or of another size than the first."""
    return gathered(((str(path), _opened(str(path), path)) for path in files), size, len(files))


def _opened(where: str, file: Path | BytesIO) -> np.ndarray:
    """uint8 [h, w, 3]."""
    from PIL import Image

    with readable(where), Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))
