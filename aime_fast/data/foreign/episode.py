"""An episode as it is read from another program's recording, and how its arrays are found and shifted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import numpy as np

from aime_fast.errors import ConfigError, DataError

# Names that programs use, the likeliest first.
KNOWN = {
    "pixels": (
        "image", "pixels", "observation", "observations", "rgb", "images", "observation/pixels", "observation/image",
        "observations/pixels", "observations/image",
    ),
    "action": ("action", "actions"),
    "reward": ("reward", "rewards", "next.reward"),
    "discount": ("discount",),
    "terminal": ("is_terminal", "terminal", "terminals", "terminated", "terminations", "dones", "done", "next.done"),
    "first": ("is_first",),
}  # fmt: skip
LAST = "last"  # what `--map` names besides: the column that marks the last row of an episode
NONE = "none"  # `--actions none`: one action is stored, always 0, whatever was recorded
NEXT = "next/"  # before a name in `--map`: the value of the following row
MOVED = ("action", "reward", "discount")  # what may be taken from there


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

    def check(self) -> None:
        """Raises ConfigError where `--map` gives a name to something unknown."""
        if unknown := [what for what in self.given if what not in (*KNOWN, LAST)]:
            raise ConfigError(f"--map {unknown[0]}={self.given[unknown[0]]}: {unknown[0]} is none of {', '.join((*KNOWN, LAST))}")

    def following(self, present: Sequence[str]) -> tuple[Names, frozenset[str]]:
        """These names without `NEXT`, and what of `MOVED` is to be taken from the following row.

        A column that is itself called `next/NAME` is taken as it is. Raises ConfigError for what cannot be moved.
        """
        moved = frozenset(what for what, name in self.given.items() if name.startswith(NEXT) and name not in present)
        if moved and (self.leads or not moved <= {*MOVED}):
            what = ", ".join(f"{what}={self.given[what]}" for what in sorted(moved))
            but = "excludes --action-leads True, which is the default beside a column step_type"
            raise ConfigError(f"--map {what}: {NEXT} is for {', '.join(MOVED)} and {but}")
        given = {what: name.removeprefix(NEXT) if what in moved else name for what, name in self.given.items()}
        return self._replace(given=given), moved

    def choose(self, present: Sequence[str], where: str) -> dict[str, str]:
        """The name of each thing of `KNOWN` that is present. Raises DataError as `find`, for pixels and actions."""
        found = {what: self.find(what, present, where, what in ("pixels", "action")) for what in KNOWN}
        return {what: name for what, name in found.items() if name is not None}

    def find(self, what: str, present: Sequence[str], where: str, needed: bool = True) -> str | None:
        """The name among those present; None: there is none, or `NONE` is wanted. Raises DataError where one that is needed is missing."""
        if what == "action" and self.given.get(what) == NONE:
            return None
        if what in self.given:
            if self.given[what] not in present:
                raise DataError(f"{where}: --map {what}={self.given[what]}: there are {', '.join(present)}")
            return self.given[what]
        found = next((name for name in KNOWN[what] if name in present), None)
        if found is None and needed:
            raise DataError(f"{where}: which is {what}? there are {', '.join(present)}; say so with --map {what}=NAME")
        return found


def build(where: str, arrays: Mapping[str, np.ndarray], leads: bool, following: Collection[str] = ()) -> Episode:
    """An episode from arrays `pixels` and perhaps `action`, `reward`, `discount`, `terminal`, as recorded; `leads`: see `Names`.

    An action that led to picture t was taken after picture t - 1. So actions, and what they brought, move up by one row, and the last
    picture, after which no action is known, is left out. `following`: what moves up alone. Where the last picture is left out but marked
    as terminal, `terminal` is about pictures, and moves too. Without actions there is one, always 0. Raises DataError for shapes that are
    none of an episode.
    """
    pixels = np.asarray(arrays["pixels"])
    if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise DataError(f"{where}: pixels are {pixels.dtype} {list(pixels.shape)}, expected uint8 [T, H, W, 3] or [T, 3, H, W]")
    rows = {what: _numbers(where, what, arrays[what]) for what in (*MOVED, "terminal") if arrays.get(what) is not None}
    steps = len(pixels)
    for what, part in rows.items():
        if len(part) not in (steps, steps - 1):
            raise DataError(f"{where}: {len(part)} {what}s for {steps} pictures, expected as many, or one less")
    moved = {what for what, part in rows.items() if len(part) == steps} if leads else {*following}
    known = min([steps, *(len(part) - (what in moved) for what, part in rows.items())])
    if known < 1:
        raise DataError(f"{where}: {steps} pictures and no action after one, expected at least one")
    if known < steps and len(rows.get("terminal", ())) == steps and rows["terminal"][-1]:
        moved.add("terminal")
    rows = {what: part[int(what in moved) :][:known] for what, part in rows.items()}
    discount = 1 - rows["terminal"] if "terminal" in rows and "discount" not in rows else rows.get("discount")
    return Episode(where, pixels[:known], rows.get("action", np.zeros((known, 1), np.float32)), rows.get("reward"), discount)


def _numbers(where: str, what: str, values: np.ndarray) -> np.ndarray:
    """float32 [T], of actions [T, A]. Raises DataError for text and other shapes."""
    values = np.asarray(values)
    if values.dtype.kind not in "biuf":
        raise DataError(f"{where}: {what}s are {values.dtype}, expected numbers; choose another column with --map {what}=NAME")
    if what != "action":
        return values.reshape(-1).astype(np.float32)
    if values.ndim not in (1, 2):
        raise DataError(f"{where}: actions have shape {list(values.shape)}, expected [T, A]")
    return values.reshape(len(values), -1).astype(np.float32)


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turns what readers raise on damaged files into a DataError that names the place."""
    try:
        yield
    except (ConfigError, DataError):
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
