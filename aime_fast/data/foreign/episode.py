"""An episode as it is read from another program's recording, and how its arrays are found and shifted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np

from aime_fast.errors import DataError

# Names that programs use, the likeliest first.
KNOWN = {
    "pixels": (
        "image", "pixels", "observation", "observations", "rgb", "images", "observation/pixels", "observation/image",
        "observations/pixels", "observations/image",
    ),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards", "next.reward"),
    "discount": ("discount",),
    "terminal": ("is_terminal", "terminal", "terminals", "dones", "terminations", "next.done"),
    "first": ("is_first",),
}  # fmt: skip


class Episode(NamedTuple):
    """Arrays of T frames, of any size of pictures; an action is taken after the picture of its row."""

    where: str  # file, and the place in it
    pixels: np.ndarray  # uint8 [T, h, w, 3]
    action: np.ndarray  # float32 [T, A]
    reward: np.ndarray | None  # float32 [T], of the action of the row; None: not recorded
    discount: np.ndarray | None  # float32 [T]


class Names(NamedTuple):
    """How a recording is read: what is called how, by `--map`, other things by `KNOWN`."""

    given: Mapping[str, str] = {}
    leads: bool | None = None  # an action led to the picture of its row, as in Dreamer; None: as is usual in the format
    image_size: int | None = None  # of pictures that are decoded one by one, see `pictures.square`; None: as they are

    def choose(self, present: Sequence[str], where: str) -> dict[str, str]:
        """The name of each thing of `KNOWN` that is present. Raises DataError as `find`, for pixels and actions."""
        found = {what: self.find(what, present, where, what in ("pixels", "action")) for what in KNOWN}
        return {what: name for what, name in found.items() if name is not None}

    def find(self, what: str, present: Sequence[str], where: str, needed: bool = True) -> str | None:
        """The name among those present. Raises DataError where one that is needed is missing."""
        if what in self.given:
            if self.given[what] not in present:
                raise DataError(f"{where}: --map {what}={self.given[what]}: there are {', '.join(present)}")
            return self.given[what]
        found = next((name for name in KNOWN[what] if name in present), None)
        if found is None and needed:
            raise DataError(f"{where}: which is {what}? there are {', '.join(present)}; say so with --map {what}=NAME")
        return found


def build(where: str, arrays: Mapping[str, np.ndarray], leads: bool) -> Episode:
    """An episode from arrays `pixels`, `action` and perhaps `reward`, `discount`, `terminal`, as recorded; `leads`: see `Names`.

    An action that led to picture t was taken after picture t - 1. So actions, and what they brought, move up by one row, and the last
    picture, after which no action is known, is left out. Raises DataError for shapes that are none of an episode.
    """
    pixels, action = np.asarray(arrays["pixels"]), np.asarray(arrays["action"])
    if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise DataError(f"{where}: pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 [T, H, W, 3]")
    action = action[:, None] if action.ndim == 1 else action
    if action.ndim != 2:
        raise DataError(f"{where}: actions have shape {list(action.shape)}, expected [T, A]")
    reward, discount = (arrays.get(name) for name in ("reward", "discount"))
    if discount is None and arrays.get("terminal") is not None:
        discount = 1.0 - np.asarray(arrays["terminal"], dtype=np.float32)
    brought = [None if part is None else np.asarray(part, dtype=np.float32).reshape(-1) for part in (reward, discount)]
    given = {"actions": action, "rewards": brought[0], "discounts": brought[1]}
    for name, part in given.items():
        if part is not None and len(part) not in (len(pixels), len(pixels) - 1):
            raise DataError(f"{where}: {len(part)} {name} for {len(pixels)} pictures, expected as many, or one less")
    known = len(pixels) - 1 if leads or len(action) < len(pixels) else len(pixels)
    if known < 1:
        raise DataError(f"{where}: {len(pixels)} pictures and no action after one, expected at least one")
    move = lambda part: None if part is None else part[1:] if leads and len(part) == len(pixels) else part[:known]  # noqa: E731
    return Episode(where, pixels[:known], move(action).astype(np.float32), *map(move, brought))


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turns what readers raise on damaged files into a DataError that names the place."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: cannot be read ({reason}); copy it again, or leave it out") from error


def optional(module: str, where: str, extra: str) -> ModuleType:
    """A module that an extra of this package installs. Raises DataError where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{where}: {module.partition('.')[0]} is not installed; pip install 'aime_fast[{extra}]'") from error
