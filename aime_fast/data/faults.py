"""What is wrong with an episode, or looks wrong, found in its arrays: one `Fault` each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aime_fast.data.episodes import RANGES, RECOLLECT

BLACK = 8  # a picture without a value above it is black: coded films are not quite at 0
PLAIN = 2  # a picture is of one colour where no channel varies by more
FROZEN = 8  # so many equal pictures on end look like a camera that stands still
LOOK = "look at it with --play"
BAD = f"training refuses it: leave the episode out, convert its source again, or {RECOLLECT}"


@dataclass(frozen=True)
class Fault:
    """One finding, as a line that names the file, the episode, the frame, the value and the remedy."""

    kind: str  # unreadable, checksum, attributes, structure, non-finite, range, constant action, black, ...
    refused: bool  # it is damage, or training refuses it; otherwise it only looks wrong
    message: str
    file: str
    episode: str | None = None
    frame: int | None = None  # the first
    value: float | str | None = None


@dataclass(frozen=True)
class Place:
    """An episode of a file."""

    file: Path
    episode: str

    def fault(self, kind: str, refused: bool, said: str, remedy: str, frame: int | None = None, value: float | None = None) -> Fault:
        """`said` about this episode, from `frame` on."""
        at = f", frame {frame}" if frame is not None else ""
        given = value if value is None or math.isfinite(value) else str(value)  # JSON has no nan
        return Fault(kind, refused, f"{self.file}: {self.episode}{at}: {said}; {remedy}", str(self.file), self.episode, frame, given)


def value_faults(place: Place, episode: Mapping[str, np.ndarray]) -> Iterator[Fault]:
    """Values that training refuses, one fault a data set and kind, and a terminal that is not the end.

    Args: episode: arrays as in the file, but `pixels`; one that cannot be read is missing.
    """
    for key, low, high in RANGES:
        if (value := episode.get(key)) is None:
            continue
        wrong = ~np.isfinite(value)
        for kind, bad, expected in (
            ("non-finite", wrong, "finite values"),
            ("range", ~wrong & ((value < low) | (value > high)), f"values in [{low:g}, {high:g}]"),
        ):
            if bad.any():
                at = tuple(int(i) for i in np.argwhere(bad)[0])
                name = " ".join([key, *map(str, at[1:])])
                said = f"{name} is {value[at]:g}, the first of {bad.sum()} such among {bad.size} values, expected {expected}"
                yield place.fault(kind, True, said, BAD, at[0], float(value[at]))
    if (begins := episode.get("is_init")) is not None and (found := np.flatnonzero(begins).tolist()) != [0]:
        said = f"is_init is true at frames {found[:5]}{' and more' if len(found) > 5 else ''}, expected at frame 0 only"
        yield place.fault("is_init", True, said, BAD)
    if (discount := episode.get("discount")) is not None and len(early := np.flatnonzero(discount[:-1] == 0)):
        said = f"discount is 0, which ends the task, but {len(discount) - 1 - early[0]} frames follow"
        yield place.fault("early end", False, said, "check what was recorded as the discount", int(early[0]), 0.0)


@dataclass
class Pictures:
    """Counts over the pictures of an episode that were looked at, given piece by piece in order."""

    seen: int = 0
    black: int = 0  # no value above BLACK
    plain: int = 0  # of one other colour
    repeated: int = 0  # equal to the one before, and neither of these
    longest: int = 0  # of the stretches of equal pictures
    first: dict[str, tuple[int, int]] = field(default_factory=dict)  # of black, plain and the longest stretch: frame and a value of it
    _last: np.ndarray | None = None
    _next: int = 0
    _stretch: int = 0

    def look(self, pixels: np.ndarray, start: int) -> None:
        """Count frames from `start` on, uint8 [n, H, W, 3]."""
        colours = pixels.reshape(len(pixels), -1, 3)
        low, high = colours.min(1).astype(int), colours.max(1).astype(int)  # [n, 3]
        black = high.max(1) <= BLACK
        plain = ~black & ((high - low).max(1) <= PLAIN)
        before = self._last if self._last is not None and start == self._next else ~pixels[:1]  # differs everywhere
        equal = (np.concatenate([before, pixels[:-1]]) == pixels).reshape(len(pixels), -1).all(1) & ~black & ~plain
        for name, which in (("black", black), ("plain", plain)):
            if which.any():
                at = int(which.argmax())
                self.first.setdefault(name, (start + at, int(high[at].max())))
        for offset, same in enumerate(equal):
            self._stretch = self._stretch + 1 if same else 1
            if self._stretch > self.longest:
                self.longest = self._stretch
                self.first["repeated"] = (start + offset + 1 - self._stretch, self._stretch)
        self.seen, self.black, self.plain = self.seen + len(pixels), self.black + int(black.sum()), self.plain + int(plain.sum())
        self.repeated += int(equal.sum())
        self._last, self._next = pixels[-1:], start + len(pixels)

    def faults(self, place: Place, frames: int) -> Iterator[Fault]:
        """What looks wrong about an episode of so many frames."""
        of = f"of {self.seen} pictures" if self.seen == frames else f"of {self.seen} pictures looked at ({frames} are there)"
        for name, count, what in (("black", self.black, "black"), ("plain", self.plain, "of one colour")):
            if count:
                frame, value = self.first[name]
                said = f"the first of {count} {of} ({count / self.seen:.0%}) that are {what}, largest value {value}"
                yield place.fault(name, False, said, f"{LOOK}, and record it again, or leave it out", frame, value)
        if self.longest >= min(FROZEN, max(2, frames)):
            frame, length = self.first["repeated"]
            said = f"{length} equal pictures from here on, {self.repeated} {of} equal the one before: the camera may have stood still"
            yield place.fault("repeated", False, said, LOOK, frame, length)

    def counts(self) -> dict[str, Any]:
        return {"looked_at": self.seen, "black": self.black, "plain": self.plain, "repeated": self.repeated}
