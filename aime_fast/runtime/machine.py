"""What a run executes on: device, compile mode, kernels, memory allocator."""

from __future__ import annotations

import ctypes
import sys
from typing import Literal, NamedTuple

import torch

from aime_fast.config import Compile
from aime_fast.errors import ConfigError
from kernels.backend import KernelError, select_kernels


class Way(NamedTuple):
    """How an update, or an imagined frame, runs."""

    regions: bool = False  # the regions of the model that gain are compiled
    whole: bool = False  # all of it is compiled as one graph; takes very long
    captured: bool = False  # it is one CUDA graph, replayed


WAYS: dict[Compile, Way] = {
    "off": Way(),
    "capture": Way(captured=True),
    "on": Way(regions=True),
    "graph": Way(regions=True, captured=True),
    "whole": Way(whole=True, captured=True),
}


def choose_device(name: str) -> torch.device:
    """The device of `--device`; `auto` is CUDA where there is a GPU. Raises ConfigError for a device that this machine lacks."""
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


def choose_compile(name: Compile | Literal["best"], device: torch.device) -> Compile:
    """`--compile`, a key of `WAYS`; `best` is capture on CUDA and on elsewhere. Raises ConfigError for what the device lacks."""
    if name != "best" and WAYS[name].captured and device.type != "cuda":
        raise ConfigError(f"--compile {name}: CUDA graphs need a CUDA device, this run is on {device}; use --compile on")
    return ("capture" if device.type == "cuda" else "on") if name == "best" else name


def choose_tf32(choice: str, precision: str) -> None:
    """`--tf32`: TF32 (10 bits of mantissa) for matrix products and convolutions in fp32 on a GPU; auto: with `--precision bf16`.

    Where it is on, cuDNN also measures which of its algorithms is the fastest, so two runs may round otherwise.
    """
    allowed = choice == "on" or (choice == "auto" and precision == "bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = allowed


def choose_kernels(name: str | None) -> None:
    """`--kernels`, or the environment variable AIME_KERNELS. Raises ConfigError for a choice that this machine cannot run."""
    try:
        select_kernels(name)
    except KernelError as error:
        raise ConfigError(f"--{error}" if name else str(error)) from None


def keep_freed_memory() -> None:
    """Makes glibc reuse freed memory instead of returning it to the system; does nothing with another C library.

    A step on a CPU allocates and frees gigabytes in large blocks. By default each block is mapped anew and each of its pages
    faults at the first access, which took a sixth of a tier-1 step. The process stays at its peak size until it ends.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
