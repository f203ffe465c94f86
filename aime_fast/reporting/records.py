"""The files of a run, read for its report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aime_fast.config import Config, from_dict
from aime_fast.errors import ConfigError
from aime_fast.training.metrics import whole_rows


@dataclass(frozen=True)
class Record:
    """The files of a run; a missing file is empty."""

    folder: Path
    rows: list[dict[str, Any]]  # metrics.jsonl
    facts: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml
    evaluation: dict[str, Any]  # evaluation/evaluation.json
    returns: dict[str, Any]  # evaluation/returns.json, of an online run
    video: Path | None  # of the evaluation; without one, of training

    def samples(self) -> list[Path]:
        """The pictures of the last training step that has any."""
        found = sorted((self.folder / "samples").glob("step_*.png"))
        step = found[-1].name[: len("step_00000000")] if found else ""
        return [path for path in found if path.name.startswith(step)]

    def series(self, name: str, over: str = "step") -> tuple[list[int], list[float | None]]:
        """The steps at which a scalar was logged, and its values there; None is a value that was not finite.

        `over` names another count to use for the step. If it starts again, only what follows the last start is returned.
        """
        found: list[tuple[int, float | None]] = []
        for row in self.rows:
            if name in row and over in row:
                if found and row[over] < found[-1][0]:
                    found.clear()
                found.append((row[over], row[name]))
        return [x for x, _ in found], [value for _, value in found]

    def names(self, prefix: str) -> list[str]:
        """Names of scalars with this prefix, in the order of their first row."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name.startswith(prefix)]


NUMBER = (int, float)
# What the report takes from files that are edited by hand, and its types.
KINDS: dict[str, dict[str, Any]] = {
    "run.json": {"parameters": NUMBER, "started": str, "device": str, "versions": dict, "resumed": list},
    "config.yaml": {"data": dict, "model": dict, "loss": dict, "optim": dict, "control": dict, "run": dict},
    "evaluation/evaluation.json": {
        "step": NUMBER,
        "latent_phase_updates": NUMBER,
        "dynamics_updates": NUMBER,
        "open_loop": dict,
        "probes": dict,
    },
    "evaluation/returns.json": dict.fromkeys(("mean", "standard_error", "minimum", "episodes", "environment_frames"), NUMBER),
}


def check_settings(found: dict[str, Any]) -> None:
    """Raise ConfigError for a setting that is out of its bounds. Those of other versions, which this one does not know, are passed over."""
    known = {field.name: field.default_factory for field in dataclasses.fields(Config) if field.name in found and field.name != "tier"}
    names = {section: {field.name for field in dataclasses.fields(kind)} for section, kind in known.items()}
    from_dict({section: {name: value for name, value in found[section].items() if name in names[section]} for section in known})


def read_record(folder: str | Path) -> Record:
    """Read the files of the run in `folder`.

    Raises:
        ConfigError: `folder` has no metrics.jsonl, or a file cannot be parsed.
    """
    import yaml

    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder}: no run here, metrics.jsonl is missing; give the folder that aime_fast.train names at its end")

    def read(name: str, parse: Callable[[str], Any]) -> Any:
        path = folder / name
        try:
            found = parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if not isinstance(found, list if parse is whole_rows else dict) and path.is_file():
                raise ValueError(f"it holds a {type(found).__name__}")
            for key, kind in KINDS.get(name, {}).items():
                if found.get(key) is None:
                    found.pop(key, None)  # as good as missing
                elif not isinstance(found[key], kind):
                    raise ValueError(f"{key} is {found[key]!r}")
            if name == "config.yaml":
                check_settings(found)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read ({str(error).splitlines()[0]}); move it away and run the report again") from None
        return found

    videos = (folder / "evaluation" / "prediction.mp4", folder / "prediction.mp4")
    return Record(
        folder=folder,
        rows=read("metrics.jsonl", whole_rows),
        facts=read("run.json", json.loads),
        config=read("config.yaml", yaml.safe_load),
        evaluation=read("evaluation/evaluation.json", json.loads),
        returns=read("evaluation/returns.json", json.loads),
        video=next((path for path in videos if path.is_file()), None),
    )
