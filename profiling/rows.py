"""Statistics and output of the rows of `profiling.bench train`, `data` and `collect`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from profiling.machine import write_json


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of at least one value."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def write_rows(path: str | None, head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write a JSON list in which each row includes the head (`machine.describe`); without a path write nothing."""
    if path is not None:
        write_json(path, [head | row for row in rows])
