"""What is in a checkpoint, whichever version wrote it, and what is wrong with it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aime_fast.config import from_dict
from aime_fast.data.faults import Fault
from aime_fast.errors import CheckpointError, UserError
from aime_fast.training.checkpoint import FORMAT, flatten, read_archive
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

# The package of each part of the model, as docs/architecture.md numbers them.
PILLARS = {
    "perceiver_io": "perceiver_io",
    "prior": "generative_prior",
    "encoder": "encoder_decoder",
    "decoder": "encoder_decoder",
    "image_discriminator": "encoder_decoder",
    "temporal_discriminator": "encoder_decoder",
    "recurrence": "temporal_dynamics",
    "attention": "attention_schema",
    "outcomes": "control",
}
# Settings that say in short what was trained.
SETTINGS = {
    "data": ("domain", "task", "data", "image_size", "frame_skip", "sequence_length", "batch_size"),
    "model": ("latent_dim", "hidden_dim", "context_dim", "max_components", "num_attention_slots"),
    "optim": ("learning_rate", "latent_phase_updates"),
    "run": ("steps", "epochs", "precision", "seed"),
}
OPTIMIZERS = ("optimizer", "discriminator_optimizer")


def inspect_checkpoint(path: Path) -> tuple[dict[str, Any], list[Fault]]:
    """What is in a checkpoint; every byte is compared with its checksum.

    Returns:
        (facts, faults): plain values that JSON has. `parameters`: of the model, by pillar; `optimizer`: whether training can go on from it.
    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this program.
    """
    state = read_archive(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict) or not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{path}: not a checkpoint of aime_fast (it has no 'model' and 'config'); give one that a run has saved")
    faults = _non_finite(path, state)
    found = state.get("format")
    if found != FORMAT:
        said = f"{path}: checkpoint format is {found}, this version reads {FORMAT}; use the version that wrote it (git_commit in run.json)"
        faults.append(Fault("format", False, said, str(path), value=str(found)))
    control = state["config"].get("control") or {}
    parameters, counted = _parameters(state)
    facts = {
        "kind": "checkpoint",
        "file": str(path),
        "bytes": path.stat().st_size,
        "checked": "verified",
        "format": found,
        **{name: state.get(name) for name in ("step", "epoch", "cycle", "seconds", "action_dim", "picture_steps")},
        "online": "behaviour" in state,
        "environment_frames": state["frames"] * _get(state["config"], "data", "frame_skip", 1) if "frames" in state else None,
        "planned_environment_frames": control.get("environment_frames") if "behaviour" in state else None,
        "settings": {"tier": state["config"].get("tier"), **settings(state["config"])},
        "parameters": parameters,
        "parameters_counted": counted,
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in _tensors(state["model"]).values()}),
        "average": "ema" in state,
        "optimizer": all(name in state for name in OPTIMIZERS),
        "split": {part: len(episodes) for part, episodes in (state.get("split") or {}).items()},
        "latent_phase": _latent_phase(state),
    }
    return facts, faults


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `SETTINGS` that a nested config has."""
    return {name: config[section][name] for section, names in SETTINGS.items() for name in names if name in (config.get(section) or {})}


def file_state(path: Path, verify: bool) -> str:
    """verified, not re-read or, with the reason, damaged: by the index of the archive alone, or by the checksums of all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip() if verify else None
    except Exception as error:  # zipfile reports a damaged archive through a dozen types
        return f"damaged ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return f"damaged (wrong checksum of {bad})" if bad else "verified" if verify else "not re-read"


def _get(config: Mapping[str, Any], section: str, name: str, otherwise: Any) -> Any:
    return (config.get(section) or {}).get(name, otherwise)


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The floating ones, by their names."""
    return {name: value for name, value in flatten(dict(state)).items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


def _non_finite(path: Path, state: Mapping[str, Any]) -> list[Fault]:
    faults = []
    for name, value in _tensors(state).items():
        if bad := int((~torch.isfinite(value)).sum()):
            said = f"{path}: {name} is not finite, {bad} of {value.numel()} values"
            remedy = "take the checkpoint before it, with --run-dir and --resume after this one was moved away"
            faults.append(Fault("non-finite", True, f"{said}; {remedy}", str(path), value=bad))
    return faults


def _parameters(state: Mapping[str, Any]) -> tuple[dict[str, int], str]:
    """Numbers by pillar, and of what: parameters, or where this version has no such model, of all weights and buffers."""
    weights, counted = _tensors(state["model"]), "weights and buffers"
    try:
        with torch.device("meta"):
            model = DPGMMVariationalRecurrentAutoencoder.from_config(from_dict(state["config"]), state["action_dim"])
        names = {name for name, _ in model.named_parameters()}
        if names <= weights.keys():
            weights, counted = {name: weights[name] for name in names}, "parameters"
    except (UserError, AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # of another version
        pass
    numbers = dict.fromkeys(PILLARS.values(), 0)
    for name, value in weights.items():
        pillar = PILLARS.get(name.split(".")[0], "other")
        numbers[pillar] = numbers.get(pillar, 0) + value.numel()
    behaviour = state.get("behaviour")
    if isinstance(behaviour, dict):
        numbers["actor and critic"] = sum(v.numel() for name in ("actor", "critic") for v in _tensors(behaviour.get(name) or {}).values())
    return numbers, counted


def _latent_phase(state: Mapping[str, Any]) -> str | None:
    """How far the latent phase is, in words."""
    phase = state.get("latent_phase")
    if not isinstance(phase, dict) or "made" not in phase:
        return None
    of = phase["made"].get("latent_phase_updates")
    return f"{of} updates, done" if phase.get("progress") is None else f"update {phase['progress'].get('update', 0)} of {of}"
