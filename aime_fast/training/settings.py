"""What a config leaves open: how long to train, where to write, where the data are, what they and the machine are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aime_fast.config import PICTURE_SHARE, Compile, Config, DataConfig, RunConfig, preset, to_dict
from aime_fast.data import DMCVBDataset, collect
from aime_fast.data.episodes import UNRECORDED
from aime_fast.errors import ConfigError, DataError
from aime_fast.runtime import ranks
from aime_fast.runtime.compile_cache import load_compiled
from aime_fast.runtime.machine import choose_compile, choose_device, choose_kernels, choose_tf32, keep_freed_memory
from aime_fast.training.checkpoint import MAY_CHANGE, flatten
from aime_fast.training.latent_phase import attending_pieces
from aime_fast.training.logging import check_loggers
from aime_fast.world_model import seen_sequences
from kernels.backend import kernels_on


def prepare_machine(run: RunConfig) -> tuple[torch.device, Compile]:
    """Sets what holds for the whole process, as the settings say; returns (device, how an update is run). Raises ConfigError."""
    device = choose_device(ranks.local_device(run.device))
    choose_kernels(run.kernels)
    choose_tf32(run.tf32, run.precision)
    compile = choose_compile(run.compile, device)
    if run.compile_cache is not None:
        load_compiled(run.compile_cache)
    if device.type == "cpu":
        keep_freed_memory()
    check_loggers(run.logger)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    return device, compile


def training_length(config: Config) -> dict[str, float | None]:
    """`{"steps": N, "epochs": None}` or the reverse.

    Where both are set, one of them comes from the tier's preset and the other overrides it. Raises ConfigError if both differ
    from the preset, if neither is set, or if the one that counts is not positive.
    """
    steps, epochs, usual = config.run.steps, config.run.epochs, preset(config.tier).run
    if steps is not None and epochs is not None:
        if steps != usual.steps and epochs != usual.epochs:
            raise ConfigError(f"--steps {steps} and --epochs {epochs:g} both say how long to train; give one of them")
        steps, epochs = (steps, None) if steps != usual.steps else (None, epochs)
    if steps is None and epochs is None:
        raise ConfigError("how long to train is not said; give --steps or --epochs")
    name, value = ("steps", steps) if steps is not None else ("epochs", epochs)
    if value <= 0:
        raise ConfigError(f"--{name} {value:g}: expected more than 0")
    return {"steps": steps, "epochs": epochs}


def check_pictures(config: Config) -> None:
    """Raises ConfigError where picture steps are asked for and no batch has single frames."""
    if config.optim.picture_steps and not config.data.stills:
        raise ConfigError(
            f"--picture-steps {config.optim.picture_steps}: these steps learn from single frames; add --stills 2, or give --picture-steps 0"
        )


def check_shares(config: Config, size: int) -> None:
    """Raises ConfigError where so many processes cannot share what an update sees evenly."""
    if size == 1:
        return
    data, model, optim = config.data, config.model, config.optim
    if config.run.compile == "whole":
        raise ConfigError(f"--compile whole: {size} processes cannot; their messages lie within what it compiles. Take another one")
    counted = {
        f"--batch-size {data.batch_size}": data.batch_size,
        "the decoded share of it": seen_sequences(data.batch_size, max(model.decoded_share, model.auxiliary_share)),
        "the auxiliary share of it": seen_sequences(data.batch_size, model.auxiliary_share),
    }
    if data.stills:
        frames = data.batch_size * data.sequence_length
        counted[f"the {frames} single frames of a batch, in {data.stills} updates"] = frames / data.stills
    if optim.latent_phase_updates != 0:
        counted[f"--latent-phase-batch-size {optim.latent_phase_batch_size}"] = optim.latent_phase_batch_size
        counted["a quarter of it"] = attending_pieces(optim.latent_phase_batch_size)
    if uneven := [f"{what} ({count:g})" for what, count in counted.items() if count % size]:
        raise ConfigError(f"{size} processes cannot share evenly: {', '.join(uneven)}; start fewer, or change these")


def picture_steps(config: Config, total_steps: int, resumed: dict[str, Any] | None) -> int:
    """How many of the steps, the first ones, are of encoder, decoder and perceiver alone.

    A run that has left them behind does not go back, and one that is resumed in them has made those that it has made.

    Args: resumed: the checkpoint to go on from, its `step` and `picture_steps` are read; None at the start.
    """
    wanted = config.optim.picture_steps
    if wanted is None:
        wanted = min(round(PICTURE_SHARE * total_steps), total_steps - 1) if config.data.stills else 0
    if resumed is None:
        return wanted
    made, planned = resumed["step"], resumed["picture_steps"]
    return planned if planned < made else max(wanted, made)


def default_run_dir(config: Config) -> Path:
    """`runs/<domain>-<task>-tier<tier>-seed<seed>`, and `-<hash>` where settings differ from the tier's preset.

    Settings that a resumed run may change do not enter the hash, so the same command with `--resume` finds its folder.
    """
    named = MAY_CHANGE | {"tier", "data.domain", "data.task", "run.seed"}
    mine, usual = flatten(to_dict(config)), flatten(to_dict(preset(config.tier)))
    differing = {name: value for name, value in sorted(mine.items()) if name not in named and value != usual[name]}
    suffix = f"-{hashlib.sha256(repr(differing).encode()).hexdigest()[:6]}" if differing else ""
    return Path("runs") / f"{config.data.domain}-{config.data.task}-tier{config.tier}-seed{config.run.seed}{suffix}"


def data_file(config: Config) -> Path:
    """Where the data of these settings are stored without --data, named after the settings that change a frame."""
    d, seed = config.data, config.run.seed
    camera = "" if d.camera == DataConfig.camera else f"-camera{d.camera}"
    name = f"{d.domain}-{d.task}-{d.image_size}px{camera}-skip{d.frame_skip}-{d.render_quality}-{d.policy}-{d.episodes}ep-seed{seed}.h5"
    return Path("data") / name


def collected_data(config: Config) -> Path:
    """The file with the data of these settings, recorded now if it is not there; with --resume, from the first episode that is missing."""
    path = data_file(config)
    if not ranks.leads():
        if not path.exists():
            raise DataError(f"{path}: process 0 has recorded it, but it is not here; all machines need the same folder, or name --data")
    elif path.exists():
        print(f"data: {path}", flush=True)
    else:
        print(f"collecting {config.data.episodes} episodes of {config.data.domain} {config.data.task} to {path}", flush=True)
        collect(config.data, config.run.seed, path, resume=config.run.resume)
    return path


def without_unrecorded_rewards(config: Config, report: Callable[[str], Any]) -> Config:
    """The config, whose outcome heads learn nothing where the data have no rewards. Raises DataError."""
    data = config.data.data
    if data == "synthetic" or not config.loss.lambda_outcome or DMCVBDataset(data, 1).attributes.get("rewards") != UNRECORDED:
        return config
    report(f"{data}: no rewards were recorded, so the heads of reward and continuation are not trained (--lambda-outcome 0)")
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, lambda_outcome=0.0))


def run_facts(config: Config, device: torch.device) -> dict[str, Any]:
    """What a run computes on, by which kernels, from which data; `renderer` by the attributes of the data set."""
    data = config.data
    recorded = {} if data.data == "synthetic" else DMCVBDataset(data.data, data.sequence_length).attributes
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "kernels": kernels_on(device),
        "data": data.data,
        "render_quality": data.render_quality,
        "renderer": recorded.get("render_backend"),
    }
