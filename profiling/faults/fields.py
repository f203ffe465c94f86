"""Every numeric setting at its extremes: refused in words that name it, or within its bounds, and then trained with."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from aime_fast.bounds import Bound, Length, check
from aime_fast.cli import parse_config
from aime_fast.config import Config, from_dict, preset, to_dict
from aime_fast.errors import ConfigError
from profiling.faults.outcome import Outcome, attempt
from profiling.faults.process import Command, isolated
from profiling.faults.runs import Site, collecting, evaluating, training

COUNT = 150  # settings on a command line, which takes 80 ms to read


class Extreme(NamedTuple):
    """One value of one numeric setting."""

    section: str
    name: str
    value: float
    bound: Bound
    kind: type
    entries: int  # of a tuple; 0: not one

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def words(self) -> list[str]:
        """As on a command line."""
        return [f"{self.flag}={self.value}"] if not self.entries else [self.flag, *[str(self.value)] * self.entries]

    @property
    def is_at_bound(self) -> bool:
        """Whether the value is a bound, or the nearest one outside."""
        low, high = self.bound.low, self.bound.high
        outside = (low - 1, high + 1) if self.kind is int else (np.nextafter(low, -math.inf), np.nextafter(high, math.inf))
        return isinstance(self.value, self.kind) and self.value in (low, high, *outside)

    @property
    def is_within(self) -> bool:
        """Whether the value is within the declared bounds; not by the code that is tested."""
        low, high = self.bound.low, self.bound.high
        if isinstance(self.value, float) and not math.isfinite(self.value):
            return False
        if self.kind is int and isinstance(self.value, float):
            return False
        above = self.value > low or (self.value == low and not self.bound.open_low)
        below = self.value < high or (self.value == high and not self.bound.open_high)
        return above and below and (self.bound.multiple == 1 or self.value % self.bound.multiple == 0)


def extremes() -> list[Extreme]:
    """Every numeric setting of `Config` at 0, -1, nan, inf, 1e30, and at and beside its own bounds."""
    found = []
    for section in dataclasses.fields(Config):
        part = getattr(preset("debug"), section.name)
        if not dataclasses.is_dataclass(part):
            continue
        for name, hint in get_type_hints(type(part), include_extras=True).items():
            if (declared := _declared(hint)) is None:
                continue
            kind, bound = declared
            entries = len(getattr(part, name)) if isinstance(getattr(part, name), tuple) else 0
            values: list[float] = [0, -1, math.nan, math.inf, -math.inf, 1e30, 10**30]
            for end in (bound.low, bound.high):
                step = [end - 1, end + 1, end + bound.multiple] if kind is int else [np.nextafter(end, -9e9), np.nextafter(end, 9e9)]
                values += [kind(end), *map(kind, step)]
            different = {repr(value): value for value in values}.values()
            found += [Extreme(section.name, name, value, bound, kind, entries) for value in different]
    return found


def _declared(hint: Any) -> tuple[type, Bound] | None:
    """Type and bounds of a numeric setting, of the entries of a tuple of them, or of the one that is not None."""
    if get_origin(hint) is Annotated:
        kind, limit = get_args(hint)
        return _declared(kind) if isinstance(limit, Length) else (kind, limit)
    return next(filter(None, map(_declared, get_args(hint))), None) if get_args(hint) else None


def fields(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """At their bounds through a config as it is in a file; random ones of all through the parser of the command line."""
    found = extremes()
    numbers, drawn = list(islice(numbers, len(found))), site.random("fields", 0).permutation(len(found))[:COUNT]
    yield from _parsed("setting in a file", [each for each in found if each.is_at_bound], _from_dict, numbers, until)
    yield from _parsed("setting on the command line", [found[i] for i in drawn], _from_command_line, numbers, until)


def commands(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """Through whole commands: `train` with values at their bounds, `evaluate` and `collect` with any."""
    found = [_trained(site, each) for each in extremes() if is_quick(each)] + _other_commands(site)
    order = site.random("commands", 0).permutation(len(found))
    for number in islice(numbers, len(found)):
        if time.monotonic() > until or number >= len(found):
            return
        kind, fault, module, words = found[order[number]]
        yield attempt(kind, f"number {number}, {fault}", lambda m=module, w=words: _command(site, m, w))


def _parsed(kind: str, found: list[Extreme], way, numbers: list[int], until: float) -> Iterator[Outcome]:
    for number, answer in isolated(lambda number: way(found[number]), [number for number in numbers if number < len(found)]):
        verdict, _, seen = answer.partition(" ")
        yield Outcome(kind, f"number {number}, {' '.join(found[number].words)}", verdict, seen)
        if time.monotonic() > until:
            return


def _from_dict(extreme: Extreme) -> str:
    values = to_dict(preset("debug"))
    values[extreme.section][extreme.name] = [extreme.value] * extreme.entries if extreme.entries else extreme.value
    try:
        from_dict(values)
    except ConfigError as error:
        return _refused(extreme, str(error))
    except BaseException as error:
        return f"traceback {type(error).__name__}: {error}"
    return "survived accepted" if extreme.is_within else f"silent accepted outside of {extreme.bound}"


def _from_command_line(extreme: Extreme) -> str:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            config = parse_config("python -m aime_fast.train", "", ["--tier", "debug", *extreme.words])
            check(config)
    except ConfigError as error:
        return _refused(extreme, str(error))
    except SystemExit as leaving:
        return _refused(extreme, said.getvalue()) if leaving.code == 2 else f"lost status {leaving.code}"
    except BaseException as error:
        return f"traceback {type(error).__name__}: {error}"
    value = getattr(getattr(config, extreme.section), extreme.name)
    read = value[0] if extreme.entries else value
    if read != extreme.value or not extreme.is_within:
        return f"silent read as {value}, accepted; the bounds are {extreme.bound}"
    return "survived accepted"


def _refused(extreme: Extreme, message: str) -> str:
    if extreme.flag not in message:
        return f"lost the message does not name {extreme.flag}: {message}"
    return f"survived refused: {message}" if not extreme.is_within else f"lost refused within {extreme.bound}: {message}"


def is_quick(extreme: Extreme) -> bool:
    """Whether a run with this value would end within seconds, if it were right."""
    return extreme.is_within and (extreme.value <= 1 or extreme.value == extreme.bound.low) and extreme.name != "steps"


def _trained(site: Site, extreme: Extreme) -> tuple[str, str, str, list[str]]:
    words = [*training("run", "--steps", "2", "--latent-phase-updates", "1"), *extreme.words]
    return "setting at its bound, trained", " ".join(extreme.words), "train", words


def _other_commands(site: Site) -> list[tuple[str, str, str, list[str]]]:
    """Numeric settings of `collect` and `evaluate`, whose extremes are refused at once."""
    values = ("0", "-1", "nan", "inf", "1e30", str(10**30), str(2**63), str(2**31))
    evaluate = [(name, value) for name in ("episodes", "clips", "context", "horizon", "samples", "seed", "batch") for value in values]
    collect = [(name, value) for name in ("episodes", "frame-skip", "image-size", "workers", "seed") for value in values[:6]]
    found = []
    for name, value in evaluate:
        more = ("--samples", "0") if name in ("clips", "horizon") else ()  # no work for each of very many
        if value != str(2**31) or name != "samples":
            found.append(("setting of evaluate", f"--{name}={value}", "evaluate", [*evaluating(site.run), *more, f"--{name}={value}"]))
    for name, value in collect:
        found.append(("setting of collect", f"--{name}={value}", "collect", [*collecting("a.h5", 1), f"--{name}={value}"]))
    return found


def _command(site: Site, module: str, words: list[str]) -> str:
    folder = site.empty("fields")
    if module == "evaluate":
        words = [*words, "--out", str(folder / "evaluation")]
    command = Command(f"aime_fast.{module}", words, folder)
    status = command.wait()
    if status == 2 and "error: " not in command.err and "For full helptext" in command.err:
        return "refused by the parser"
    command.check(0, 2, 3)
    return command.last_line()
