"""The records of a run: `metrics.jsonl`, TensorBoard and wandb by flag, `run.json`, `config.yaml`, lines on the console."""

from __future__ import annotations

import datetime
import errno
import importlib.util
import json
import math
import os
import platform
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aime_fast.config import Config, to_dict
from aime_fast.errors import ConfigError
from aime_fast.runtime.files import move_aside, naming, write_text
from aime_fast.runtime.provenance import command_line, git_commit, version
from aime_fast.training.metrics import Report, ResumePoint, cut_rows, kind

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

    A row's x is its `step`; that of a row of the latent phase is `latent_phase/update`. Rows that wandb has got already, before a resume
    repeated their steps, are not sent again.

    Args:
        run_dir: folder of the run; `metrics.jsonl` is appended to.
        config: `run.logger` names the places besides `metrics.jsonl`: `tensorboard` (files under `run_dir/tensorboard`, the latent phase
            as a run of its own), `wandb` (`WANDB_MODE=offline` works without a network).
        point: where the run goes on; rows that it writes again are dropped from `metrics.jsonl`.
        report: called with messages about damaged files.

    Attributes: rows: of `metrics.jsonl`.

    Raises:
        ConfigError: wandb cannot start. OSError: the folder cannot be written to.
    """

    def __init__(self, run_dir: Path, config: Config, point: ResumePoint = ResumePoint(), report: Report = print):  # noqa: B008
        self.path = run_dir / "metrics.jsonl"
        self.rows, dropped = cut_rows(self.path, point, report)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._boards: dict[bool, Any] | None = None
        self._wandb, self._sent = None, set()
        if "tensorboard" in config.run.logger:
            purge = {False: point.step + 1 if point.step else None, True: 0}
            self._boards, self._purge, self._board_dir = {}, purge, run_dir / "tensorboard"
        if "wandb" in config.run.logger:
            if (run_dir / "wandb_id").exists():
                self._sent = {(row["step"], kind(row)) for row in dropped if kind(row) != "latent_phase"}
            self._wandb = start_wandb(run_dir, config, report)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line: `{"step": step, **metrics}`. Non-finite numbers become null, which every JSON reader accepts."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with naming(self.path):
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        self.rows += 1
        if self._boards is not None:
            update = metrics.get("latent_phase/update")
            for name, value in metrics.items():
                self._board(update is not None).add_scalar(name, value, step if update is None else update)
        if self._wandb is not None and (step, kind(metrics)) not in self._sent:
            self._wandb.log({"step": step, **metrics})

    def picture(self, step: int, name: str, path: Path) -> None:
        """Show a PNG in the places that show pictures."""
        if self._boards is not None:
            from PIL import Image

            self._board(False).add_image(name, np.asarray(Image.open(path)), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"step": step, name: wandb.Image(str(path))})

    def close(self) -> None:
        """Close everything; each row is in its file already."""
        with suppress(OSError):
            self._file.close()
        for board in (self._boards or {}).values():
            board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _board(self, latent_phase: bool):
        """The TensorBoard writer of joint updates or of the latent phase, whose x starts anew and replaces that of an earlier phase."""
        if latent_phase not in self._boards:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._board_dir / "latent_phase" if latent_phase else self._board_dir
            with naming(folder):
                self._boards[latent_phase] = SummaryWriter(str(folder), purge_step=self._purge[latent_phase])
        return self._boards[latent_phase]


def start_wandb(run_dir: Path, config: Config, report: Report):
    """A wandb run, or the continuation of the one that `wandb_id` names. Raises ConfigError if wandb cannot start.

    Every row gets a step of wandb's own, so that none is refused or merged with another; charts have the run's step, or the update of the
    latent phase, as x.
    """
    import wandb

    path, identity = run_dir / "wandb_id", ""
    if os.path.lexists(path):
        with suppress(OSError, ValueError):
            identity = path.read_text(encoding="utf-8").strip()
        if not re.fullmatch(r"[\w-]{1,64}", identity, re.ASCII):
            report(f"{path}: damaged; it is now {move_aside(path).name}, and the run gets a new identity in wandb")
            identity = ""
    if not identity:
        identity = uuid.uuid4().hex[:8]
        write_text(path, identity)
    try:
        run = wandb.init(project="aime_fast", name=run_dir.name, id=identity, resume="allow", dir=run_dir, config=to_dict(config))
    except wandb.Error as error:
        raise ConfigError(f"--logger wandb: {error}; log in with: wandb login, or set WANDB_MODE=offline") from error
    run.define_metric("*", step_metric="step")
    run.define_metric("latent_phase/*", step_metric="latent_phase/update")
    return run


class Console:
    """Lines and a progress bar; plain lines where the output is no terminal or `rich` is not installed.

    `on_lost(signum)` is called once, with SIGHUP where a terminal was closed and SIGPIPE where nobody reads a pipe, when the output cannot
    be written any more; from then on nothing is written.
    """

    def __init__(self, total_steps: int, step: int = 0, on_lost: Callable[[int], None] = lambda signum: None):
        self._progress, self._drawn, self._on_lost = None, 0.0, on_lost
        self.lost = False
        if sys.stdout.isatty():
            try:
                from rich import progress
            except ImportError:
                return
            columns = (
                progress.TextColumn("training"), progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
            )  # fmt: skip
            self._progress = progress.Progress(*columns, auto_refresh=False)  # a thread of its own would meet a closed terminal unseen
            self._task = self._progress.add_task("training", total=total_steps, completed=step)
            self._write(self._progress.start)

    def advance(self, step: int) -> None:
        """Move the bar to `step`; it is drawn five times a second at most."""
        if self._progress is not None and not self.lost:
            draws = time.monotonic() - self._drawn > 0.2
            self._drawn = time.monotonic() if draws else self._drawn
            self._write(partial(self._progress.update, self._task, completed=step, refresh=draws))

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            self._write(partial(self._progress.console.print, text, markup=False, highlight=False))
        else:
            self._write(partial(print, text, flush=True))

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._write(self._progress.stop)

    def _write(self, write: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            write()
        except (OSError, SystemExit) as error:  # rich leaves the program where a pipe breaks
            self.lost = True
            hung_up = getattr(error, "errno", errno.EPIPE) != errno.EPIPE and hasattr(signal, "SIGHUP")
            self._on_lost(signal.SIGHUP if hung_up else signal.SIGPIPE)
            with suppress(
                OSError, ValueError, AttributeError
            ):  # what is left in Python's buffer would fail again at the end of the program
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Silence:
    """Console and logger of a process that does not lead its run."""

    rows, lost = 0, False

    def say(self, *_: Any) -> None:
        """Nothing."""

    line = advance = log = picture = say

    def close(self) -> None:
        """Nothing is open."""


def write_run_files(run_dir: Path, config: Config, facts: dict[str, Any], resumed: bool, report: Report = print) -> None:
    """`config.yaml` (every setting) and `run.json` (what the run really uses: versions, machine, commit, command line, `facts`).

    A resumed run adds its facts to `resumed` in `run.json` and leaves those of the start as they are. A damaged `run.json` is moved aside,
    with a message through `report`, and written again.
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
    if resumed and os.path.lexists(path):
        try:
            first = json.loads(path.read_text(encoding="utf-8"))
            now = first | {"resumed": [*first.get("resumed", []), now]}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # unreadable, no JSON, or not an object with a list
            report(f"{path}: damaged; it is now {move_aside(path).name}, and written again from this start on")
    write_text(path, json.dumps(now, indent=2) + "\n")
    settings = json.loads(json.dumps(to_dict(config)))  # tuples as lists, which YAML has
    write_text(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False))


def launched_by(run_dir: Path) -> str | None:
    """The `launch` of the last start of the run in a folder; None where there is none."""
    try:
        first = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        return [first, *first.get("resumed", [])][-1].get("launch")
    except (OSError, ValueError, AttributeError, TypeError):
        return None
