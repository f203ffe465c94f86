"""The import rules of docs/architecture.md, read from the source, and that the packages import on a bare machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PILLARS = ("perceiver_io", "generative_prior", "encoder_decoder", "temporal_dynamics", "attention_schema", "multi_task_learning")
COMMANDS = ("train", "collect", "evaluate", "report")


def modules() -> dict[str, Path]:
    """Every module of ours by dotted name."""
    files = [f for package in ("aime_fast", "kernels", "profiling") for f in (ROOT / package).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(path: Path) -> set[str]:
    """Dotted names of ours that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("aime_fast", "kernels", "profiling")}


def part(module: str) -> str:
    """The layer a module belongs to."""
    names = module.split(".")
    if names[0] != "aime_fast":
        return names[0]
    second = names[1] if len(names) > 1 else "aime_fast"
    return "pillar" if second in PILLARS else "command" if second in COMMANDS else second


ALLOWED = {
    "kernels": {"kernels"},
    "config": set(),
    "layers": set(),
    "spans": set(),
    "graph": set(),
    "roll_out": {"graph"},
    "provenance": set(),
    "cli": {"config", "data", "aime_fast"},
    "pillar": {"pillar", "kernels", "layers", "roll_out"},
    "inference": {"pillar", "layers", "spans"},
    "imagination": {"pillar", "inference", "roll_out"},
    "overshooting": {"pillar", "inference", "imagination"},
    "latent_overshooting": {"pillar", "layers", "inference", "imagination", "overshooting"},
    "world_model": {"pillar", "layers", "config", "spans", "inference", "imagination", "overshooting", "roll_out", "aime_fast"},
    "data": {"data", "config"},
    "training": {
        "training",
        "latent_overshooting",
        "kernels",
        "world_model",
        "data",
        "config",
        "cli",
        "pillar",
        "provenance",
        "spans",
        "graph",
    },
    "reporting": {"reporting", "training", "cli"},
    "command": {"training", "reporting", "data", "cli", "config", "pillar", "provenance"},
    "aime_fast": set(),
    "profiling": {
        "profiling",
        "kernels",
        "training",
        "world_model",
        "data",
        "config",
        "cli",
        "pillar",
        "layers",
        "provenance",
        "spans",
        "graph",
    },
}


@pytest.mark.parametrize("module", sorted(modules()))
def test_arrows_point_one_way(module):
    layer = part(module)
    wrong = {name: part(name) for name in imported(modules()[module]) if part(name) not in ALLOWED[layer] | {layer}}
    assert not wrong, f"{module} is in {layer!r} and may not import {wrong}"


def test_packages_import_without_simulator_and_loggers():
    """As on a GPU machine that holds little but PyTorch."""
    missing = ("dm_control", "mujoco", "torchrl", "wandb", "tyro", "rich", "imageio_ffmpeg", "torchmetrics", "matplotlib", "tensorboard")
    names = [name for name in modules() if part(name) != "command"]
    program = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {missing!r}:
            raise ModuleNotFoundError(f'{{name}} is not installed here', name=name)
sys.meta_path.insert(0, Absent())
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
