"""Checkpoints: everything needed to resume, in one file that is either whole or absent.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, so `torch.load(weights_only=True)` reads it and
it cannot run code. It is written to a temporary name, flushed to the disk and renamed: a kill at any moment leaves the
previous checkpoints untouched. Python's and NumPy's global generators are not in it: nothing in a training step draws from them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from aime_fast.config import RENAMED, Config, from_dict, to_dict
from aime_fast.errors import CheckpointError

# 2: flat optimizer state; 3: a prior with inertia; 4: keypoints, a recurrence that reads deltas, a latent phase; 5: other names
FORMAT = 5
_NAME = re.compile(r"checkpoint_(\d{8,})\.pt")

# What a resumed run may change: how long, where and how it reports, never what is computed from which data; and the latent phase, which
# is then run again.
MAY_CHANGE = frozenset(
    f"run.{name}"
    for name in (
        "steps", "epochs", "device", "precision", "compile", "threads", "run_dir", "resume", "logger", "log_every",
        "validate_every", "validation_batches", "sample_every", "checkpoint_every", "keep_checkpoints", "on_nan",
    )
) | {
    "data.data", "data.workers", "data.prefetch", "data.replay", "optim.latent_phase_updates", "optim.latent_phase_batch_size",
    "optim.latent_phase_frames", "optim.latent_phase_learning_rate",
}  # fmt: skip


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first; empty where there are none."""
    found = [(int(match[1]), path) for path in Path(run_dir).glob("checkpoint_*.pt") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run_dir: str | Path) -> Path:
    """The newest checkpoint of a run. Raises CheckpointError where there is none."""
    if not (checkpoints := list_checkpoints(run_dir)):
        raise CheckpointError(f"{run_dir}: no checkpoint here; name another run with --run-dir, or start this one without --resume")
    return checkpoints[-1]


def save_checkpoint(run_dir: str | Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoint_<step>.pt` atomically, then delete all but the `keep` newest. Returns its path.

    Raises OSError if the disk is full or read-only; earlier checkpoints are then still there.
    """
    run_dir = Path(run_dir)
    path = run_dir / f"checkpoint_{step:08d}.pt"
    for stale in run_dir.glob("checkpoint_*.pt.tmp"):  # left by a kill in the middle of a write
        stale.unlink()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save({"format": FORMAT, "step": step, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(run_dir)
    for old in list_checkpoints(run_dir)[: -max(1, keep)]:
        old.unlink()
    return path


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The contents of one checkpoint. Raises CheckpointError if it is missing, truncated or of another format."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch reports a damaged archive through half a dozen types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not a whole checkpoint, truncated or damaged ({reason}); use an older one") from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found not in (4, FORMAT):
        raise CheckpointError(f"{path}: checkpoint format is {found}, expected {FORMAT}; it was written by another version")
    return _rename_format_4(state) if found == 4 else state


def _rename_format_4(state: dict[str, Any]) -> dict[str, Any]:
    """A state of format 4 under the names of format 5. The order of parameters, and so the flat optimizer state, is the same."""

    def weights(saved: dict[str, Any]) -> dict[str, Any]:
        renamed = {"dynamics": "recurrence", "expect_context": "context_prior"}
        split = {name: name.partition(".") for name in saved}
        return {renamed.get(first, first) + dot + rest: saved[name] for name, (first, dot, rest) in split.items()}

    phase = state.pop("dynamics")
    if phase is not None:
        made = {RENAMED.get(name, name): value for name, value in phase["made"].items()}
        phase = {"made": made, "before": weights(phase["before"])}
    config = to_dict(from_dict(state["config"]))
    names = {"format": FORMAT, "latent_phase": phase, "config": config, "model": weights(state["model"]), "ema": weights(state["ema"])}
    return state | names


def read_latest(run_dir: str | Path, device: torch.device | str = "cpu", report=print) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that can be read; each damaged one on the way is reported through `report(message)`.

    Raises CheckpointError if there is none at all, or every one is damaged.
    """
    latest_checkpoint(run_dir)
    for path in reversed(list_checkpoints(run_dir)):
        try:
            return path, read_checkpoint(path, device)
        except CheckpointError as error:
            report(f"{error}; trying the one before")
    raise CheckpointError(f"{run_dir}: every checkpoint is damaged; start again in another --run-dir")


def check_same_config(saved: dict[str, Any], config: Config) -> None:
    """Raise CheckpointError naming each field in which a resumed run differs from the one that wrote the checkpoint.

    Fields in `MAY_CHANGE` may differ.
    """
    old, new = _flatten(saved), _flatten(to_dict(config))
    differing = [
        f"{name} was {old.get(name)!r}, is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in MAY_CHANGE and old.get(name) != new.get(name)
    ]
    if differing:
        allowed = ", ".join(sorted(name.split(".")[1] for name in MAY_CHANGE))
        raise CheckpointError(
            "--resume: these settings differ from the run that wrote the checkpoint: " + "; ".join(differing)
            + f". Give the same flags again (run.json in the run's folder has the command); only these may change: {allowed}"
        )  # fmt: skip


def rng_state() -> dict[str, Any]:
    """The state of torch's generators: `cpu`, and one of each CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`. A run moved to a machine with other GPUs keeps the states of those that both have."""
    torch.set_rng_state(state["cpu"].cpu())
    for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), index)


def load_model(run_or_checkpoint: str | Path, device: torch.device | str = "cpu", ema: bool = True, report=print):
    """A trained model, ready for evaluation.

    Args:
        run_or_checkpoint: a run's folder (its newest readable checkpoint is taken) or one checkpoint file.
        device: where the model goes.
        ema: the averaged weights, or the last ones.
        report: called with a message for each damaged checkpoint that is passed over.

    Returns:
        (model in eval mode, its Config, info) where info holds `checkpoint` (Path), `step`, `epoch`, `action_dim`, `ema`, and
        `latent_phase_updates`, those of the latent phase that the weights went through.

    Raises:
        CheckpointError: nothing there, damaged, or of another version.
    """
    from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

    path = Path(run_or_checkpoint)
    if not path.exists():
        raise CheckpointError(f"{path}: neither a run's folder nor a checkpoint file")
    path, state = read_latest(path, "cpu", report) if path.is_dir() else (path, read_checkpoint(path, "cpu"))
    config = from_dict(state["config"])
    model = DPGMMVariationalRecurrentAutoencoder.from_config(config, state["action_dim"])
    model.load_state_dict(state["ema" if ema else "model"])
    phase = state["latent_phase"] if ema else None
    info = {"checkpoint": path, "step": state["step"], "epoch": state["epoch"], "action_dim": state["action_dim"], "ema": ema}
    info["latent_phase_updates"] = phase["made"]["latent_phase_updates"] if phase else 0
    return model.to(device).eval(), config, info


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, list) else value
    return flat


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
