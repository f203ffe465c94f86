"""The bounds of settings, declared in the type of each field and checked in one place."""

from __future__ import annotations

import dataclasses
import math
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from aime_fast.errors import ConfigError


class Bound(NamedTuple):
    """Values from `low` to `high`; without `low` or `high` itself where that end is open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    multiple: int = 1  # integers are multiples of it

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and (self.multiple == 1 or value % self.multiple == 0)

    def __str__(self) -> str:
        interval = f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        return interval if self.multiple == 1 else f"{interval}, a multiple of {self.multiple}"


class Length(NamedTuple):
    """The number of entries of a tuple."""

    low: int
    high: int


NUMBERS = {int: "an integer", float: "a number"}

Count = Annotated[int, Bound(1, 10**9)]
Steps = Annotated[int, Bound(0, 10**9)]  # 0: never
Seed = Annotated[int, Bound(0, 2**32 - 1)]
Few = Annotated[int, Bound(0, 64)]
Layers = Annotated[int, Bound(1, 64)]
Width = Annotated[int, Bound(1, 65536)]
HeadedWidth = Annotated[int, Bound(4, 65536, multiple=4)]  # four attention heads, or a 2D position code
Share = Annotated[float, Bound(0, 1)]
OpenShare = Annotated[float, Bound(0, 1, open_high=True)]
Weight = Annotated[float, Bound(0, 1e6)]
Positive = Annotated[float, Bound(0, 1e6, open_low=True)]


def check(config: Any) -> None:
    """Raise ConfigError, naming flag, value and bound, for the first field of a dataclass whose value is not of its type or in its bounds.

    Fields that are dataclasses are checked likewise.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            check(value)
        elif (problem := _problem(value, hint)) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {problem}")


def _problem(value: Any, hint: Any) -> str | None:
    """What was expected of the value, or None where it is right."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind, limit = arguments
        wrong = _problem(value, kind)
        if isinstance(limit, Length):
            return wrong or (None if limit.low <= len(value) <= limit.high else f"{limit.low} to {limit.high} entries")
        return f"{NUMBERS[kind]} {limit}" if wrong or value not in limit else None
    if origin in (Union, UnionType):
        problems = [_problem(value, kind) for kind in arguments if kind is not NoneType]
        return None if value is None or None in problems else " or ".join(filter(None, problems))
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a list"
        return next((f"each entry to be {problem}" for entry in value if (problem := _problem(entry, arguments[0]))), None)
    if hint in NUMBERS:
        right = isinstance(value, (int, hint)) and not isinstance(value, bool) and math.isfinite(value)
        return None if right else NUMBERS[hint]
    return None if isinstance(value, hint) else f"a value of type {hint.__name__}"
