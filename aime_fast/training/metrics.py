"""Reading and cutting `metrics.jsonl`: one JSON object a line, `{"step": n, name: number or null, ...}`."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from aime_fast.runtime.files import DAMAGED, move_aside, replacing

Row = dict[str, Any]

OLD_NAMES = {"dynamics/": "latent_phase/", "attention_dynamics": "attention_motion"}  # parts of names, of runs before 25 November 2026
Report = Callable[[str], None]


class ResumePoint(NamedTuple):
    """Where a run goes on: rows that it writes again are dropped."""

    step: int = 0
    rows: int | None = None  # of the file when the checkpoint was saved; None where the checkpoint does not say
    finished: bool = False  # no joint update is left, so that the run validates at `step` once more


def kind(row: Row) -> str:
    """training, validation or latent_phase."""
    return next((kind for kind in ("validation", "latent_phase") if any(name.startswith(kind + "/") for name in row)), "training")


def parse_row(line: str | bytes) -> Row | None:
    """A line as a row of numbers (None: not finite) under the present names, or None if it is not one. Other values are left out."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            return None
        numbers = {name: value for name, value in row.items() if value is None or isinstance(value, (int, float))}
        return {_present(name): value if value is None or math.isfinite(value) else None for name, value in numbers.items()}
    except (ValueError, OverflowError, RecursionError):
        return None


def _present(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def whole_rows(text: str) -> list[Row]:
    """The rows of a metrics file; a last line that is being written, or that a kill cut short, is left out.

    Raises ValueError for any other line that is not a row.
    """
    *lines, _ = text.split("\n")
    rows = [parse_row(line) for line in lines if line.strip()]
    if None in rows:
        raise ValueError(f"row {rows.index(None) + 1} is not a JSON object with a step")
    return rows


def read_rows(run_dir: Path) -> list[Row]:
    """The rows of a run; none where it has none yet. Raises ValueError as `whole_rows` does."""
    path = run_dir / "metrics.jsonl"
    return whole_rows(path.read_text(encoding="utf-8")) if path.is_file() else []


def cut_rows(path: Path, point: ResumePoint, report: Report = print) -> tuple[int, list[Row]]:
    """Drop from a metrics file what the run writes again from `point` on, and lines that are not rows; the rest stays to the byte.

    A file with damaged lines, except for a last one that a kill cut short, is copied beside it as `metrics.jsonl.damaged`.

    Returns:
        the number of rows that stay, and the rows dropped.
    """
    if not os.path.lexists(path):
        return 0, []
    if not path.is_file():
        report(f"{path} is not a regular file; it is now {move_aside(path).name}, a new one begins")
        return 0, []
    *lines, _ = path.read_bytes().split(b"\n")
    lines = [line for line in lines if line.strip()]
    rows = [parse_row(line) for line in lines]
    if damaged := rows.count(None):
        copy = path.with_name(path.name + DAMAGED)
        shutil.copyfile(path, copy)
        report(f"{path}: {damaged} damaged lines are left out; the file as it was is {copy.name}")
    staying, dropped = [], []
    for place, (line, row) in enumerate((line, row) for line, row in zip(lines, rows) if row is not None):
        (dropped if _comes_again(row, place, point) else staying).append((line, row))
    with replacing(path) as file:
        file.write(b"".join(line + b"\n" for line, _ in staying))
    return len(staying), [row for _, row in dropped]


def _comes_again(row: Row, place: int, point: ResumePoint) -> bool:
    validates = kind(row) == "validation"
    if row["step"] > point.step or (validates and point.finished and row["step"] == point.step):
        return True
    # After the checkpoint, at its step: of a latent phase that was not finished. A validation at the end of a run that now goes on stays.
    return point.rows is not None and place >= point.rows and not validates
