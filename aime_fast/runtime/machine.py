"""What a config leaves open: how long, where to, on which device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from aime_fast.cli import ConfigError
from aime_fast.config import Config, OptimConfig, preset
from kernels.backend import KernelError, select_kernels


def how_long(config: Config) -> dict[str, float | None]:
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


def default_run_dir(config: Config) -> Path:
    """`runs/<domain>-<task>-tier<tier>-seed<seed>`."""
    return Path("runs") / f"{config.data.domain}-{config.data.task}-tier{config.tier}-seed{config.run.seed}"


def data_file(config: Config) -> Path:
    """Where the data of these settings are kept when no --data is given, named after the settings that change a frame.

    The number of workers, which changes how seeds are dealt out, is not in the name: keep two such recordings with --data.
    """
    d, seed = config.data, config.run.seed
    name = f"{d.domain}-{d.task}-{d.image_size}px-skip{d.frame_skip}-{d.render_quality}-{d.policy}-{d.episodes}ep-seed{seed}.h5"
    return Path("data") / name


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU. Raises ConfigError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: unknown; choose cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver"
            raise ConfigError(f"--device cuda: {why} (torch {torch.__version__}); use --device cpu, or install a CUDA build of torch")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s), numbered from 0")
    return device


def choose_compile(name: str, device: torch.device) -> str:
    """`--compile`: off, on or graph; `best` is graph on CUDA and on elsewhere. Raises ConfigError for what the device lacks."""
    if name == "graph" and device.type != "cuda":
        raise ConfigError(f"--compile graph: CUDA graphs need a CUDA device, this run is on {device}; use --compile on")
    return ("graph" if device.type == "cuda" else "on") if name == "best" else name


def check_dynamics(optim: OptimConfig) -> None:
    """Raises ConfigError for a dynamics phase that nothing could make."""
    for name, least in (("updates", 0), ("batch_size", 1), ("frames", 1), ("learning_rate", 0)):
        if (value := getattr(optim, f"dynamics_{name}")) < least:
            raise ConfigError(f"--dynamics-{name.replace('_', '-')} {value}: at least {least} is needed")


def choose_kernels(name: str | None) -> None:
    """`--kernels`, or the environment variable AIME_KERNELS. Raises ConfigError for a choice that this machine cannot run."""
    try:
        select_kernels(name)
    except KernelError as error:
        raise ConfigError(f"--{error}" if name else str(error)) from None


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step instead of handing it back to the system; does nothing elsewhere.

    A step on a CPU allocates and frees gigabytes in large blocks. By default each block is mapped anew and every page of it
    faults at its first touch, which took a sixth of a tier-1 step. The process then shows its peak size until it ends.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
