"""Checkpoints: everything needed to resume, in one file that is either whole or absent.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, so `torch.load(weights_only=True)` reads it and
it cannot run code. It is written to a temporary name, flushed to the disk and renamed: a kill at any moment leaves the previous
checkpoints untouched. The checksums that `torch.save` writes are verified before anything is loaded. Python's and NumPy's global
generators are not in it: nothing in a training step draws from them.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aime_fast.config import Config, from_dict, to_dict
from aime_fast.data.split import saved_split
from aime_fast.errors import CheckpointError, ConfigError, DamagedError, NonFiniteError, UserError, explain
from aime_fast.runtime.files import DAMAGED, TEMPORARY, move_aside, replacing

# 2: flat optimizer state; 3: a prior with inertia; 4: keypoints, a recurrence that reads deltas, a latent phase; 5: other names;
# 6: progress of the latent phase, Gram and the KL of attention weighed by themselves; 7: towers over patches;
# 8: a moving frame of reference; 9: movement scaled, no norm in the prior;
# 10: the spread of roll-outs; 11: a context that recalls; 12: tokens of drawn pictures: no weights of others fit;
# 13: a latent phase with Adam on the device; 14: GroupNorm and SiLU in one layer; 15: heads of reward and
# continuation; 16: an average of the actor, random numbers of one device
FORMAT = 16
_NAME = re.compile(r"checkpoint_(\d{8,})\.pt")

# What a resumed run may change: how long, where and how it reports, and who plays, never what is computed from which data; and the latent
# phase, which is then run again.
MAY_CHANGE = frozenset(
    f"run.{name}"
    for name in (
        "steps", "epochs", "device", "precision", "messages", "tf32", "compile", "compile_cache", "threads", "run_dir", "resume", "logger",
        "log_every", "validate_every", "validation_batches", "sample_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints",
        "on_nan",
    )
) | {
    "data.data", "data.workers", "data.prefetch", "data.replay", "optim.latent_phase_updates", "optim.latent_phase_batch_size",
    "optim.latent_phase_frames", "optim.latent_phase_learning_rate", "optim.keep_best_latent_phase", "control.environment_frames",
    "control.return_episodes", "control.plays_beside",
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


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Of the checkpoint after so many updates."""
    return run_dir / f"checkpoint_{step:08d}.pt"


def save_checkpoint(run_dir: str | Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoint_<step>.pt` atomically, then delete all but the `keep` newest. Returns its path.

    Raises OSError, naming the file, if the disk is full or read-only; earlier checkpoints are then still there.
    """
    run_dir = Path(run_dir)
    path = checkpoint_path(run_dir, step)
    for stale in run_dir.glob(f"checkpoint_*.pt{TEMPORARY}"):  # left by a kill in the middle of a write
        stale.unlink()
    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, "step": step, **state}, file)
        except RuntimeError as error:
            raise _cause(error) from None
    others = [old for old in list_checkpoints(run_dir) if old != path]
    for old in others[: max(0, len(others) + 1 - max(1, keep))]:
        old.unlink()
    return path


def _cause(error: RuntimeError) -> Exception:
    """The failed write behind an error of torch's archive writer, which replaces it with one about positions in the file."""
    context: BaseException | None = error
    while context is not None:
        if isinstance(context, OSError):
            return context
        context = context.__context__
    return error


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The contents of one checkpoint, every byte of which has been compared with its checksum.

    Raises:
        DamagedError: truncated or damaged.
        CheckpointError: missing, unreadable, or of another format: an older one would not help, or should not be taken unasked.
    """
    state = read_archive(path, device)
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format is {found}, this version reads {FORMAT}; run it with the version that wrote it "
            "(git_commit in run.json), or start anew in another --run-dir"
        )
    return state


def read_archive(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """What `read_checkpoint` reads, of whatever format it is. Raises DamagedError, or CheckpointError if it is missing or unreadable."""
    path = Path(path)
    if not path.is_file():
        found = "a folder lies in its place" if path.is_dir() else "not a regular file" if path.exists() else "no such checkpoint"
        raise CheckpointError(f"{path}: {found}; name another one, or move it away")
    try:
        data = path.read_bytes()  # once: what is verified is what is loaded
        return _unpack(path, data, device)
    except OSError as error:
        raise CheckpointError(f"checkpoint {explain(error)}") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: too little memory to read it ({path.stat().st_size / 1e6:.0f} MB); free some") from error


def _unpack(path: Path, data: bytes, device: torch.device | str) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (bad := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {bad}")
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except Exception as error:  # zipfile and torch report a damaged archive through a dozen types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in reason:
            raise MemoryError from error
        raise DamagedError(f"{path}: not a whole checkpoint, truncated or damaged ({reason})") from error


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Turns the errors of a state that lacks keys, has others, or other shapes, into a CheckpointError that says so."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (UserError, torch.OutOfMemoryError)):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = f"no {error}" if isinstance(error, KeyError) else lines[min(1, len(lines) - 1)]  # torch's first line is a heading
        raise CheckpointError(
            f"{path}: its content does not fit this version of aime_fast ({reason}); use the version that wrote it (git_commit in run.json)"
        ) from error


def read_latest(run_dir: str | Path, device: torch.device | str = "cpu", report=print, aside: bool = False) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole; each damaged one on the way is reported through `report(message)`.

    `aside` renames those to `checkpoint_*.pt.damaged`, so that a run that goes on from an older one does not count them.
    Raises CheckpointError if there is none at all, every one is damaged, or one cannot be read for another reason.
    """
    run_dir, damaged = Path(run_dir), []
    if not list_checkpoints(run_dir) and any(run_dir.glob(f"checkpoint_*.pt{DAMAGED}*")):
        raise CheckpointError(f"{run_dir}: every checkpoint is damaged; start again in another --run-dir")
    latest_checkpoint(run_dir)
    for path in reversed(list_checkpoints(run_dir)):
        try:
            state = read_checkpoint(path, device)
        except DamagedError as error:
            report(f"{error}; trying the one before")
            damaged.append(path)
            continue
        for bad in damaged if aside else ():
            report(f"{bad.name} is now {move_aside(bad).name}")
        return path, state
    raise CheckpointError(f"{run_dir}: every checkpoint is damaged; start again in another --run-dir")


def last_good(saved: Path | None, run_dir: Path) -> str:
    """For messages: the checkpoint that a run which fails can go on from."""
    return f"last good checkpoint: {saved}" if saved else f"no checkpoint has been saved yet in {run_dir}"


def find_resume(run_dir: Path, resume: bool, report=print) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The newest whole checkpoint and its state if a run is to go on and there is one; (None, None) for a run that starts.

    Raises:
        ConfigError: the run is not to go on, and the folder holds one.
        CheckpointError: see `read_latest`.
    """
    if resume and (list_checkpoints(run_dir) or any(run_dir.glob(f"checkpoint_*.pt{DAMAGED}*"))):
        return read_latest(run_dir, report=report, aside=True)
    if resume:
        report(f"{run_dir}: no checkpoint here yet; the run starts from step 0")
    elif found := list_checkpoints(run_dir):
        raise ConfigError(
            f"{run_dir} holds a run already (newest: {found[-1].name}); add --resume to go on with it, or name another folder with "
            "--run-dir"
        )
    return None, None


def check_same_config(saved: dict[str, Any], config: Config) -> None:
    """Raise CheckpointError naming each field in which a resumed run differs from the one that wrote the checkpoint.

    Fields in `MAY_CHANGE` may differ, and those of `control` but `online` where nothing is played. A field that the checkpoint does not
    know yet counts as its default.
    """
    old, new = flatten(to_dict(from_dict(saved))), flatten(to_dict(config))
    unread = () if old["control.online"] or new["control.online"] else {name for name in new if name.startswith("control.")}
    differing = [
        f"{name} was {old.get(name)!r}, is now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in MAY_CHANGE and name not in unread and old.get(name) != new.get(name)
    ]
    if differing:
        allowed = ", ".join(sorted(name.split(".")[1] for name in MAY_CHANGE))
        raise CheckpointError(
            "--resume: these settings differ from the run that wrote the checkpoint: " + "; ".join(differing)
            + f". Give the same flags again (run.json in the run's folder has the command); only these may change: {allowed}"
        )  # fmt: skip


def check_finite(state: dict[str, Any], step: int) -> None:
    """Raise NonFiniteError, naming the tensors of a state (weights, averages, buffers, moments) that are not finite."""
    tensors = {name: value for name, value in flatten(state).items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    bad: list[str] = []
    for device in {value.device for value in tensors.values()}:  # one wait for each device
        names = [name for name, value in tensors.items() if value.device == device]
        finite = torch.stack([torch.isfinite(tensors[name]).all() for name in names]).tolist()
        bad += [name for name, good in zip(names, finite) if not good]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(f"{', '.join(bad[:3])}{more} at step {step}: not finite; this step was not saved")


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's generators: `cpu`, and `cuda`, that of the run's device; None on a CPU."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `rng_state`, for the device of whichever process goes on: all processes of a run draw the same numbers."""
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def load_model(run_or_checkpoint: str | Path, device: torch.device | str = "cpu", ema: bool = True, report=print):
    """A trained model, ready for evaluation.

    Args:
        run_or_checkpoint: a run's folder (its newest readable checkpoint is taken) or one checkpoint file.
        device: where the model goes.
        ema: the averaged weights, or the last ones.
        report: called with a message for each damaged checkpoint that is passed over.

    Returns:
        (model in eval mode, its Config, info) where info holds `checkpoint` (Path), `step`, `epoch`, `action_dim`, `ema`,
        `split` (`data.split.Split`), `latent_phase_updates`, those of the latent phase that the weights went through, and of an online run
        `actor`, `average_actor` and `critic`, their weights (else None), and `environment_frames` (else 0).

    Raises:
        CheckpointError: nothing there, damaged, or of another version (of which the names or shapes of weights may tell).
    """
    from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

    path = Path(run_or_checkpoint)
    if not path.exists():
        raise CheckpointError(f"{path}: neither a run's folder nor a checkpoint file")
    path, state = read_latest(path, "cpu", report) if path.is_dir() else (path, read_checkpoint(path, "cpu"))
    with fitting(path):
        config = from_dict(state["config"])
        model = DPGMMVariationalRecurrentAutoencoder.from_config(config, state["action_dim"])
        model.load_state_dict(state["ema" if ema else "model"])
        phase = state["latent_phase"] if ema else None
        info = {"checkpoint": path, "step": state["step"], "epoch": state["epoch"], "action_dim": state["action_dim"], "ema": ema}
        info["split"] = saved_split(state)
        info["latent_phase_updates"] = _phase_updates(phase)
        info |= {name: state["behaviour"][name] if "behaviour" in state else None for name in ("actor", "average_actor", "critic")}
        info["environment_frames"] = state.get("frames", 0) * config.data.frame_skip
    return model.to(device).eval(), config, info


def _phase_updates(phase: dict[str, Any] | None) -> int:
    """Updates of a latent phase that the weights went through."""
    if phase is None:
        return 0
    if phase["progress"] is not None:
        return phase["progress"].get("update", 0)
    return phase["best"]["update"] if "best" in phase else phase["made"]["latent_phase_updates"]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with names like `optim.learning_rate`; lists as tuples."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, list) else value
    return flat
