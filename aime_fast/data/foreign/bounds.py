"""Where episodes begin and end in columns that hold all of them, one after the other.

The first of these that is there decides: the column of `--map first=NAME` or `last=NAME`; how long each episode is, `ep_len`; after which
row each ends, `episode_ends`; flags of every row. Flags are `step_type` of dm_env, `is_first`, and what marks a last row: whatever is
terminal, timed out or cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from aime_fast.data.foreign.episode import KNOWN, LAST, Names
from aime_fast.errors import DataError

LENGTHS = ("ep_len", "episode_lengths")
OFFSETS = "ep_offset"  # the row at which each begins; `ep_len` says so too
ENDINGS = ("episode_ends", "meta/episode_ends")
STEP_TYPE = "step_type"
BEGINS, GOES_ON, ENDS = 0, 1, 2  # its values
CUT = ("truncations", "truncated", "timeouts")  # an episode ends there, and its task goes on
FINAL = (*KNOWN["terminal"], "is_last", *CUT)
REMEDY = "name a column that marks each first row with --map first=NAME, each last one with last=NAME, or add ep_len, rows of each episode"


class Marks(NamedTuple):
    """Columns of a file or group that may say where episodes are."""

    where: str
    present: Sequence[str]
    names: Names
    values: Callable[[str], np.ndarray]  # of a column
    rows: int

    def at(self, name: str, value: int, allowed: Sequence[int] = (0, 1)) -> list[int]:
        """Rows of this value. Raises DataError where the column has other rows than pictures, or other values."""
        found = self.values(name).reshape(-1)
        if len(found) != self.rows:
            raise DataError(f"{self.where}: {name} has {len(found)} rows, pixels have {self.rows}; expected as many")
        if other := np.flatnonzero(~np.isin(found, allowed)).tolist():
            what = f"{name} of row {other[0]} is {found[other[0]]}, expected one of {', '.join(map(str, allowed))}"
            raise DataError(f"{self.where}: {what}; {REMEDY}")
        return np.flatnonzero(found == value).tolist()

    def flags(self) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Rows that each column marks as the first of an episode, and as the last. What `--map` names is asked alone."""
        given = self.names.given
        told = [given[what] for what in ("first", LAST) if what in given]
        if absent := [name for name in told if name not in self.present]:
            raise DataError(f"{self.where}: --map {LAST}={absent[0]}: there are {', '.join(self.present)}")
        if told:
            return tuple({given[what]: self.at(given[what], 1)} if what in given else {} for what in ("first", LAST))
        lasts = dict.fromkeys((given.get("terminal"), *FINAL))
        firsts, lasts = ({name: self.at(name, 1) for name in names if name in self.present} for names in (KNOWN["first"], lasts))
        if STEP_TYPE in self.present:
            firsts[STEP_TYPE], lasts[STEP_TYPE] = (self.at(STEP_TYPE, value, (BEGINS, GOES_ON, ENDS)) for value in (BEGINS, ENDS))
        return firsts, lasts


def episode_rows(marks: Marks) -> list[tuple[int, int]]:
    """(first row, row after the last) of each episode. Raises DataError where columns contradict each other or say nothing."""
    told = marks.names.given.keys() & {"first", LAST}
    if not told and (name := next((name for name in (*LENGTHS, *ENDINGS) if name in marks.present), None)):
        return _listed(marks, name)
    firsts, lasts = marks.flags()
    begins, ends = {row for rows in firsts.values() for row in rows}, {row + 1 for rows in lasts.values() for row in rows}
    if not begins and not ends:
        known = ", ".join((*LENGTHS, *ENDINGS, STEP_TYPE, *KNOWN["first"], *FINAL))
        what = f"{', '.join([*firsts, *lasts])} marks no row, not even the last" if firsts or lasts else f"there is none of {known}"
        raise DataError(f"{marks.where}: where do episodes begin? {what}; {REMEDY}")
    if begins and (other := sorted(ends - begins - {marks.rows})):
        name = next(name for name, rows in lasts.items() if other[0] - 1 in rows)
        what = f"{name} marks row {other[0] - 1} as the last of an episode, {' and '.join(firsts)} not the next as a first"
        raise DataError(f"{marks.where}: {what}; say which is right with --map first=NAME or last=NAME")
    return list(pairwise(sorted({0, *(begins or ends), marks.rows})))


def check_single(marks: Marks) -> None:
    """Raises DataError where flags say that several episodes lie in what should be one."""
    names = marks.names.given
    for name, value, row in (
        (names.get("first", KNOWN["first"][0]), 1, 0), (names.get(LAST, "is_last"), 1, -1), (STEP_TYPE, BEGINS, 0), (STEP_TYPE, ENDS, -1)
    ):  # fmt: skip
        if name in marks.present:
            found = marks.values(name).reshape(-1)
            rows, expected = np.flatnonzero(found == value).tolist(), range(len(found))[row]
            if rows not in ([], [expected]):
                what = f"{name} is {value} at rows {', '.join(map(str, rows[:5]))} of {len(found)}"
                raise DataError(f"{marks.where}: {what}, expected one episode a group, {value} at row {expected} alone")


def _listed(marks: Marks, name: str) -> list[tuple[int, int]]:
    """By a column of one number an episode."""
    found = marks.values(name).reshape(-1)
    if found.dtype.kind not in "iuf" or (found % 1 != 0).any():
        raise DataError(f"{marks.where}: {name} is {found.dtype}, expected whole numbers, one an episode; {REMEDY}")
    ends = found.astype(np.int64)
    bounds = [0, *(np.cumsum(ends) if name in LENGTHS else ends).tolist()]
    for number, (begin, end) in enumerate(pairwise(bounds)):
        if not begin < end <= marks.rows:
            raise DataError(f"{marks.where}: by {name} episode {number} is rows {begin} to {end} of {marks.rows}; {REMEDY}")
    if bounds[-1] != marks.rows:
        raise DataError(f"{marks.where}: by {name} the last episode ends with row {bounds[-1]} of {marks.rows}; {REMEDY}")
    if OFFSETS in marks.present and name in LENGTHS and marks.values(OFFSETS).reshape(-1).tolist() != bounds[:-1]:
        raise DataError(f"{marks.where}: {OFFSETS} is not where episodes begin by {name}; {REMEDY}")
    return list(pairwise(bounds))
