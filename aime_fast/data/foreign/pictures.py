"""Pictures of recordings: decoded, and brought to a square as they are read, so that a long film of large pictures fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

from aime_fast.data.foreign.episode import readable
from aime_fast.errors import DataError


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


def decoded(where: str, coded: Sequence[bytes], size: int | None = None) -> np.ndarray:
    """Pictures of files in memory, such as PNG or JPEG: uint8 [T, h, w, 3], or `square` ones of a size.

    Raises DataError for one that is damaged, or of another size than the first.
    """
    from PIL import Image

    shape: tuple[int, ...] | None = None
    pictures = np.empty((0, 0, 0, 3), np.uint8)
    for t, part in enumerate(coded):
        with readable(f"{where}: picture {t}"):
            picture = np.asarray(Image.open(BytesIO(part)).convert("RGB"))
        shape = shape or picture.shape
        if picture.shape != shape:
            raise DataError(f"{where}: picture {t} is {list(picture.shape)}, the first {list(shape)}; they must be alike")
        picture = square(picture, size)
        if not t:
            pictures = np.empty((len(coded), *picture.shape), np.uint8)
        pictures[t] = picture
    return pictures
