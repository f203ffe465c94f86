"""What a run wrote down, read back for its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aime_fast.cli import ConfigError
from aime_fast.training.logging import whole_rows


@dataclass(frozen=True)
class Record:
    """The files of a run; what is absent is empty."""

    folder: Path
    rows: list[dict[str, Any]]  # metrics.jsonl
    facts: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml
    evaluation: dict[str, Any]  # evaluation/evaluation.json
    video: Path | None  # of the evaluation, otherwise of the training

    def samples(self) -> list[Path]:
        """The pictures of the last training step that left some."""
        found = sorted((self.folder / "samples").glob("step_*.png"))
        step = found[-1].name[: len("step_00000000")] if found else ""
        return [path for path in found if path.name.startswith(step)]

    def series(self, name: str, over: str = "step") -> tuple[list[int], list[float | None]]:
        """Steps (or another count) and values of one scalar, where it was logged; where the count begins anew, from there on."""
        found: list[tuple[int, float | None]] = []
        for row in self.rows:
            if name in row and over in row:
                if found and row[over] < found[-1][0]:
                    found.clear()
                found.append((row[over], row[name]))
        return [x for x, _ in found], [value for _, value in found]

    def names(self, prefix: str) -> list[str]:
        """Names of the scalars that begin so, in the order in which they were logged first."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name.startswith(prefix)]


def read_record(folder: str | Path) -> Record:
    """The record of the run in `folder`.

    Raises:
        ConfigError: there is no run, or one of its files is damaged.
    """
    import yaml

    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder}: no run here, metrics.jsonl is missing; give the folder that aime_fast.train names at its end")

    def read(name: str, parse: Callable[[str], Any]) -> Any:
        path = folder / name
        try:
            return parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]}); move it away and run the report again") from None

    videos = (folder / "evaluation" / "prediction.mp4", folder / "prediction.mp4")
    return Record(
        folder=folder,
        rows=read("metrics.jsonl", whole_rows),
        facts=read("run.json", json.loads),
        config=read("config.yaml", yaml.safe_load),
        evaluation=read("evaluation/evaluation.json", json.loads),
        video=next((path for path in videos if path.is_file()), None),
    )
