"""The import rules of docs/architecture.md, read from the source, and that the packages import on a bare machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PILLARS = ("perceiver_io", "generative_prior", "encoder_decoder", "temporal_dynamics", "attention_schema", "multi_task_learning")
COMMANDS = ("train", "collect", "convert", "evaluate", "report", "inspect")


def modules() -> dict[str, Path]:
    """Every module of ours by dotted name."""
    files = [f for package in ("aime_fast", "kernels", "profiling") for f in (ROOT / package).rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it but under `if TYPE_CHECKING`."""
    names: set[str] = set()
    known = modules()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names.update(name if name in known else node.module for name in submodules)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in names if name.split(".")[0] in ("aime_fast", "kernels", "profiling")}


def part(module: str) -> str:
    """The part of the project that a module belongs to."""
    names = module.split(".")
    if names[0] != "aime_fast":
        return names[0]
    second = names[1] if len(names) > 1 else "aime_fast"
    return "pillar" if second in PILLARS else "command" if second in COMMANDS else second


MODEL = {"pillar", "layers", "config", "runtime", "imagination", "world_model", "control"}
ALLOWED = {
    "aime_fast": set(),
    "kernels": set(),
    "bounds": {"errors"},
    "config": {"bounds", "errors"},
    "errors": set(),
    "layers": {"kernels"},
    "cli": {"bounds", "config", "errors"},
    "runtime": {"kernels", "config", "errors"},
    "pillar": {"kernels", "layers", "config", "runtime"},
    "imagination": {"pillar", "layers", "runtime"},
    "control": {"imagination", "layers"},
    "world_model": {"bounds", *MODEL},
    "data": {"bounds", "config", "errors", "runtime"},
    "evaluation": {"data", *MODEL},
    "training": {"evaluation", "data", "kernels", "bounds", "errors", *MODEL},
    "reporting": {"config", "evaluation", "training", "runtime", "errors"},
    "command": {"reporting", "training", "evaluation", "data", "runtime", "bounds", "config", "cli", "errors"},
    "profiling": {"command", "reporting", "training", "evaluation", "data", "kernels", "bounds", "cli", "errors", *MODEL},
}


@pytest.mark.parametrize("module", sorted(modules()))
def test_arrows_point_one_way(module):
    layer = part(module)
    wrong = {name: part(name) for name in imported(modules()[module]) if part(name) not in ALLOWED[layer] | {layer}}
    assert not wrong, f"{module} is in {layer!r} and may not import {wrong}"


def test_no_module_imports_itself_through_others():
    graph = {name: imported(path) - {name} for name, path in modules().items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle


def test_packages_import_without_simulator_and_loggers():
    """As on a GPU machine that holds little but PyTorch."""
    missing = (
        "dm_control",
        "mujoco",
        "torchrl",
        "wandb",
        "tyro",
        "rich",
        "imageio_ffmpeg",
        "torchmetrics",
        "matplotlib",
        "PIL",
        "tensorboard",
    )
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
