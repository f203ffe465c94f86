"""Make the report of a run: `python -m aime_fast.report RUN` writes RUN/report.html, one file that opens offline.

It uses what the run has written so far, also during training. It names what is missing and the command that makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tyro.conf import Positional

from aime_fast.cli import parse_arguments, run_command
from aime_fast.errors import ConfigError


@dataclass(frozen=True)
class ReportConfig:
    """What to report on."""

    run: Positional[str]  # run directory
    out: str | None = None  # file to write; none: report.html in the run directory
    data: str | None = None  # data for the pictures; none: those of the run
    device: str = "auto"  # cpu, cuda or auto
    ema: bool = True  # pictures by the moving average of the weights instead of the weights themselves


def report(options: ReportConfig) -> Path:
    """Write the report and return its path. Raises ConfigError if `options.run` holds no run."""
    from aime_fast.reporting.records import read_record

    record = read_record(options.run)
    from aime_fast.reporting.page import write_report  # imports torch, too slow to load before the name of the run is checked

    out = write_report(record, _model(options), Path(options.out) if options.out else record.folder / "report.html")
    print(f"report      {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def _model(options: ReportConfig):
    """The model of the newest checkpoint with validation episodes, or the reason why there is none; the report is written either way."""
    from aime_fast.data import make_batches
    from aime_fast.errors import CheckpointError, DataError
    from aime_fast.reporting.page import EPISODES, Model
    from aime_fast.runtime.machine import choose_device, choose_kernels
    from aime_fast.training.checkpoint import latest_checkpoint, load_model

    device = choose_device(options.device)
    choose_kernels(None)
    try:
        model, config, info = load_model(latest_checkpoint(options.run), device, ema=options.ema)
        data = replace(config.data, data=options.data or config.data.data, replay="host")
        split = None if options.data else info["split"]
        (validation,) = make_batches(data, config.run.seed, device, split, parts=("validation",))
    except (CheckpointError, ConfigError, DataError, FileNotFoundError) as error:
        return str(error)
    except (RuntimeError, ValueError) as error:  # weights or settings of another version of the model
        return f"the checkpoint does not fit this version of aime_fast ({str(error).splitlines()[0]}); use the commit in run.json"
    try:
        episodes = [validation.episode(i) for i in range(min(EPISODES, len(validation.episodes)))]
        return Model(model, episodes, config.model.codebook_size)
    finally:
        validation.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and write the report."""
    report(parse_arguments(ReportConfig, "python -m aime_fast.report", "Write the report of a run as one HTML file.", argv))


if __name__ == "__main__":
    run_command(main)
