"""Machine, versions and commit of a measurement, and its JSON file. Needs no package but PyTorch."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from aime_fast.runtime.files import write_text
from aime_fast.runtime.provenance import command_line, git_commit, version

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "numpy", "vector-quantize-pytorch", "torchjd")


def describe(device: torch.device | str) -> dict[str, Any]:
    """Machine, versions, commit, command line and time, for the head of a JSON file."""
    return {
        "command": command_line(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "machine": machine(torch.device(device)),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory, threads and, for CUDA, the GPU."""
    facts = {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return facts


def title(device: torch.device) -> str:
    """A short description of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads, {processor()}"


def processor() -> str:
    """The name of the processor, from the operating system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def driver() -> str | None:
    """Version of the NVIDIA driver, or None if it cannot be read."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _finite(value: Any) -> Any:
    """Infinity and NaN as null: JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a file atomically, infinity and NaN as null; its folder is created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(content), indent=1) + "\n")
