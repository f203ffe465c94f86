"""What is in the folder of a run: what it was, how far it is, what can be gone on from, and what is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aime_fast.data.faults import Fault
from aime_fast.data.inspection import inspect_data, shards_in
from aime_fast.errors import DataError
from aime_fast.runtime.files import DAMAGED
from aime_fast.training.checkpoint import list_checkpoints
from aime_fast.training.inspection import file_state, settings
from aime_fast.training.metrics import Row, parse_row

# Of metrics.jsonl: the last value of each.
SHOWN = (
    "epoch", "time", "frames_per_second", "skipped_updates", "environment_frames",
    "loss/elbo", "loss/perceiver", "loss/predictive", "loss/adversarial",
    "validation/psnr", "validation/psnr_mean_frame", "validation/code_usage", "validation/effective_components",
    "validation/reward_explained", "latent_phase/update", "latent_phase/one_step", "latent_phase/rolled_out",
    "play/return", "behaviour/imagined_return", "behaviour/entropy",
)  # fmt: skip
FACTS = ("command", "started", "git_commit", "device", "platform", "precision", "compile", "kernels", "processes", "parameters", "renderer")
RESULTS = (
    "report.html", "prediction.mp4", "evaluation/evaluation.json", "evaluation/prediction.mp4", "evaluation/prediction.png",
    "evaluation/returns.json", "evaluation/returns.mp4", "evaluation/returns.png", "evaluation/plan/returns.json",
)  # fmt: skip


def inspect_run(folder: Path, verify: bool = False) -> tuple[dict[str, Any], list[Fault]]:
    """What is in a run's folder.

    Args: verify: compare the checksums of all checkpoints and of the episodes that the run has recorded; otherwise none of them is read.

    Returns: (facts, faults): plain values that JSON has; what no file tells is None or empty.
    """
    import yaml

    faults: list[Fault] = []
    facts = _read(folder / "run.json", json.loads, faults)
    config = _read(folder / "config.yaml", yaml.safe_load, faults)
    rows = _rows(folder, faults)
    last = {name: value for name in SHOWN if (value := _last(rows, name)) is not None}
    for name, (step, value) in last.items():
        if value is None:
            said = f"{folder / 'metrics.jsonl'}: {name} is not finite at step {step}"
            faults.append(Fault("non-finite", False, f"{said}; see `python -m aime_fast.report {folder}`", str(folder), value=name))
    checkpoints = [_checkpoint(path, verify, faults) for path in list_checkpoints(folder)]
    for path in sorted(folder.glob(f"*{DAMAGED}*")):
        faults.append(Fault("moved aside", False, f"{path}: a damaged file that the run moved aside; delete it", str(path)))
    whole = [each for each in checkpoints if not each["checked"].startswith("damaged")]
    control, run = config.get("control") or {}, config.get("run") or {}
    resumed = facts["resumed"] if isinstance(facts.get("resumed"), list) else []
    online = bool(control.get("online"))
    result = {
        "kind": "run",
        "folder": str(folder),
        "online": online,
        "facts": {name: facts[name] for name in FACTS if facts.get(name) is not None},
        "versions": facts.get("versions") if isinstance(facts.get("versions"), dict) else {},
        "resumed": len(resumed),
        "settings": {"tier": config.get("tier"), **settings(config)} if config else {},
        "step": max([row["step"] for row in rows] + [each["step"] for each in checkpoints], default=None),
        "cycles": sum("environment_frames" in row for row in rows) if online else None,
        "planned": {"environment_frames": control.get("environment_frames")}
        if online
        else {name: run[name] for name in ("steps", "epochs") if run.get(name) is not None},
        "metrics": {name: {"step": step, "value": value} for name, (step, value) in last.items()},
        "rows": len(rows),
        "checkpoints": checkpoints,
        "resume": _resume(folder, whole, facts),
        "results": [name for name in RESULTS if (folder / name).is_file()],
        "samples": len(list((folder / "samples").glob("*.png"))),
        "tensorboard": (folder / "tensorboard").is_dir(),
        "episodes": _episodes(folder / "episodes", verify, faults),
    }
    return result, faults


def _read(path: Path, parse: Callable[[str], Any], faults: list[Fault]) -> dict[str, Any]:
    """A file of the run; empty, with a fault, where it is missing or damaged."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except FileNotFoundError:
        said = f"{path}: missing; the run has not begun to train, or the folder was copied in part"
        faults.append(Fault("missing", False, said, str(path)))
    except Exception as error:  # OSError, ValueError, RecursionError and the parser's own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        faults.append(Fault("unreadable", True, f"{path}: cannot be read ({reason}); move it away, or copy it again", str(path)))
    return {}


def _rows(folder: Path, faults: list[Fault]) -> list[Row]:
    """The rows of metrics.jsonl that are whole; a last line without an end may be being written."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = [(number, parse_row(line)) for number, line in enumerate(lines, 1) if line.strip()]
    if bad := [number for number, row in rows if row is None]:
        said = f"{path}: row {bad[0]} is not a JSON object with a step, as are {len(bad)} rows in all; they are left out when it is resumed"
        faults.append(Fault("unreadable", True, said, str(path), value=bad[0]))
    return [row for _, row in rows if row is not None]


def _last(rows: list[Row], name: str) -> tuple[int, float | None] | None:
    """Step and value of the last row that has a metric; a value of None was not finite."""
    return next(((row["step"], row[name]) for row in reversed(rows) if name in row), None)


def _checkpoint(path: Path, verify: bool, faults: list[Fault]) -> dict[str, Any]:
    state = file_state(path, verify)
    if state.startswith("damaged"):
        remedy = "the run goes on from the one before with --resume; copy the file again, or delete it"
        faults.append(Fault("checkpoint", True, f"{path}: {state}; {remedy}", str(path)))
    return {"name": path.name, "step": int(path.stem.removeprefix("checkpoint_")), "bytes": path.stat().st_size, "checked": state}


def _resume(folder: Path, whole: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any] | None:
    """The newest whole checkpoint and the command that goes on from it; None where there is none."""
    if not whole:
        return None
    command = str(facts.get("command") or "python -m aime_fast.train ...")
    command += "" if "--run-dir" in command else f" --run-dir {folder}"
    return {"checkpoint": whole[-1]["name"], "command": command if "--resume" in command else f"{command} --resume"}


def _episodes(folder: Path, verify: bool, faults: list[Fault]) -> dict[str, Any] | None:
    """The episodes that an online run has recorded: how many, and with `verify` what is in them."""
    paths = shards_in(folder) if folder.is_dir() else []
    if not paths:
        return None
    counted = {"files": len(paths), "bytes": sum(path.stat().st_size for path in paths), "frames": None, "checked": {}}
    if verify:
        try:
            found, wrong = inspect_data(paths, verify)
            faults += wrong
            counted |= {"frames": found["frames"], "checked": found["checked"]}
        except DataError as error:
            faults.append(Fault("file", True, str(error), str(folder)))
    return counted
