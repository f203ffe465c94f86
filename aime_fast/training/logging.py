"""The records of a run: `metrics.jsonl`, TensorBoard and wandb by flag, `run.json`, `config.yaml`, lines on the console."""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import os
import platform
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aime_fast.config import Config, to_dict
from aime_fast.errors import ConfigError
from aime_fast.runtime.provenance import command_line, git_commit, version

PACKAGES = (
    "torch", "triton", "torchrl", "tensordict", "dm_control", "mujoco", "numpy", "h5py", "einops", "imageio-ffmpeg",
)  # fmt: skip


def check_loggers(names: Iterable[str]) -> None:
    """Raise ConfigError if the package of one of `--logger`'s names is not installed."""
    for name in names:
        if name != "jsonl" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--logger {name}: the package is not installed; install it with: pip install {name}")


class Logger:
    """Writes the metrics of a run to every place that `run.logger` names.

    Args:
        run_dir: folder of the run; `metrics.jsonl` is appended to.
        config: `run.logger` names the places besides `metrics.jsonl`: `tensorboard` (files under `run_dir/tensorboard`), `wandb`
            (`WANDB_MODE=offline` works without a network).
        resume_step: metrics after this step are dropped from `metrics.jsonl`, since the resumed run writes them again.

    Raises:
        ConfigError: wandb cannot start.
    """

    def __init__(self, run_dir: Path, config: Config, resume_step: int = 0):
        self.path = run_dir / "metrics.jsonl"
        keep_until(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._tensorboard = self._wandb = None
        if "tensorboard" in config.run.logger:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
        if "wandb" in config.run.logger:
            self._wandb = self._start_wandb(run_dir, config)

    @staticmethod
    def _start_wandb(run_dir: Path, config: Config):
        import wandb

        identity = run_dir / "wandb_id"  # a resumed run continues the same wandb run
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex[:8])
        try:
            return wandb.init(
                project="aime_fast", name=run_dir.name, id=identity.read_text(), resume="allow", dir=run_dir, config=to_dict(config)
            )
        except wandb.Error as error:
            raise ConfigError(f"--logger wandb: {error}; log in with: wandb login, or set WANDB_MODE=offline") from error

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line: `{"step": step, **metrics}`. Non-finite numbers become null, which every JSON reader accepts."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, metrics.get("latent_phase/update", step))
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG in the places that show pictures."""
        if self._tensorboard is not None:
            from PIL import Image

            self._tensorboard.add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; none where it is not there yet."""
    path = run_dir / "metrics.jsonl"
    return whole_rows(path.read_text(encoding="utf-8")) if path.is_file() else []


def whole_rows(text: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file; a last line that is being written, or that a kill cut short, is left out."""
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


class Console:
    """Lines and a progress bar; plain lines where the output is no terminal or `rich` is not installed."""

    def __init__(self, total_steps: int, step: int = 0):
        self._progress = None
        if sys.stdout.isatty():
            try:
                from rich import progress
            except ImportError:
                return
            self._progress = progress.Progress(
                progress.TextColumn("training"), progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
            )
            self._task = self._progress.add_task("training", total=total_steps, completed=step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()


def keep_until(path: Path, step: int) -> None:
    """Drop from a metrics file every line after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    remaining = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                remaining.append(line)
        except (ValueError, KeyError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in remaining), encoding="utf-8")
    os.replace(temporary, path)


def write_run_files(run_dir: Path, config: Config, facts: dict[str, Any], resumed: bool) -> None:
    """`config.yaml` (every setting) and `run.json` (what the run really uses: versions, machine, commit, command line, `facts`).

    A resumed run adds its facts to `resumed` in `run.json` and leaves those of the start as they are.
    """
    import yaml

    path = run_dir / "run.json"
    now = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "seed": config.run.seed,
        "precision": config.run.precision,
        "threads": torch.get_num_threads(),
        **facts,
        "git_commit": git_commit(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    if resumed and path.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        now = first | {"resumed": [*first.get("resumed", []), now]}
    path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    settings = json.loads(json.dumps(to_dict(config)))  # tuples as lists, which YAML has
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
