"""Mean and spread of what was measured over several runs, as a rule of different seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Facts about an evaluation, not measures; `wanted` is the constant of a target.
FACTS = ("step", "latent_phase_updates", "episodes", "seed", "seconds", "clips", "context", "horizon", "samples", "frames", "wanted")


def measures(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float | list]]:
    """(path, value) of every number, and every list of numbers, in a nested result; names on a path are joined by "/"."""
    for name, value in node.items():
        here = f"{path}/{name}" if path else name
        if isinstance(value, Mapping):
            yield from measures(value, here)
        elif name not in FACTS and (_is_number(value) or (isinstance(value, list) and all(x is None or _is_number(x) for x in value))):
            yield here, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """mean, spread (sample standard deviation, None for fewer than two) and runs: how many values there are."""
    found = [value for value in values if value is not None]
    return {
        "mean": math.fsum(found) / len(found) if found else None,
        "spread": statistics.stdev(found) if len(found) > 1 else None,
        "runs": len(found),
    }


def summarise(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of results of `evaluate` by run: runs; scalars: `spread` by path; curves: mean and spread at each step, by path.

    A number that only some runs have is summarised over those. Curves that differ in length are left out.
    """
    found: dict[str, list] = {}
    for result in results.values():
        for path, value in measures(result):
            found.setdefault(path, []).append(value)
    scalars = {path: spread(values) for path, values in found.items() if not any(isinstance(value, list) for value in values)}
    curves = {}
    for path, values in found.items():
        if all(isinstance(value, list) for value in values) and len({len(value) for value in values}) == 1:
            steps = [spread(step) for step in zip(*values)]
            curves[path] = {kind: [step[kind] for step in steps] for kind in ("mean", "spread")}
    return {"runs": list(results), "scalars": scalars, "curves": curves}


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the scalars as one table."""
    width = max(map(len, summary["scalars"]), default=0)
    print(f"\n{len(summary['runs'])} runs: {', '.join(summary['runs'])}\n")
    print(f"{'':{width}s}        mean      spread  runs")
    for path, row in summary["scalars"].items():
        mean, deviation = (f"{'-':>12s}" if row[kind] is None else f"{row[kind]:12.4f}" for kind in ("mean", "spread"))
        print(f"{path:{width}s}{mean}{deviation}{row['runs']:6d}")
