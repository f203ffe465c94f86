"""Measure how many frames a second collection records.

Records episodes of a dm_control task to a temporary HDF5 file, as `python -m aime_fast.collect` does, once for each number of workers and
repeat. `frames_per_second` excludes the start of the workers; `seconds`, the mean time of a recording, includes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aime_fast.config import PRESETS, DataConfig, preset
from aime_fast.data import DMCVBDataset, collect
from aime_fast.errors import DataError
from profiling.machine import describe, title
from profiling.rows import spread, write_rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench collect`."""
    parser.add_argument("--tier", choices=tuple(PRESETS), default="1", help="preset of task, frame skip and image size; default 1")
    parser.add_argument("--domain", help="another dm_control domain")
    parser.add_argument("--task", help="another task")
    parser.add_argument("--workers", type=int, nargs="+", help="default: that of the tier")
    parser.add_argument("--episodes", type=int, default=8, help="episodes of a recording; default 8")
    parser.add_argument("--repeats", type=int, default=3, help="recordings a row; default 3")
    parser.add_argument("--json", metavar="FILE", help="write the rows here, each with machine, versions, commit and command")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Measure, print and write; returns the exit status."""
    if options.repeats < 1:
        usage_error(f"--repeats {options.repeats}: expected at least 1")
    overrides = {name: getattr(options, name) for name in ("domain", "task", "episodes") if getattr(options, name) is not None}
    data = dataclasses.replace(preset(options.tier).data, **overrides)
    head, rows = describe("cpu"), []
    print(f"{title(torch.device('cpu'))}\n{'task':<24}{'workers':>8}{'frames/s':>10}{'p20':>10}{'p80':>10}{'seconds':>9}  renderer")
    for workers in options.workers or [data.workers]:
        try:
            row = {"tier": options.tier} | measure(dataclasses.replace(data, workers=workers), options.repeats)
        except (DataError, ImportError) as error:
            usage_error(str(error))
        rows.append(row)
        speed, name = row["frames_per_second"], f"{row['domain']} {row['task']}"
        print(
            f"{name:<24}{workers:>8}{speed['median']:>10.0f}{speed['p20']:>10.0f}{speed['p80']:>10.0f}{row['seconds']:>9.1f}"
            f"  {row['render_backend']}",
            flush=True,
        )
    write_rows(options.json, head, rows)
    return 0


def measure(data: DataConfig, repeats: int) -> dict[str, Any]:
    """One row: `repeats` recordings of `data.episodes` episodes, each with its own seed. Raises DataError as `collect` does."""
    rates, began = [], time.perf_counter()
    for seed in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            recorded = DMCVBDataset(collect(data, seed, Path(folder) / "bench.h5", progress=False), sequence_length=1)
            frames, attributes = sum(recorded.lengths), recorded.attributes
        rates.append(frames / attributes["collection_seconds"])
    return {
        **{name: getattr(data, name) for name in ("domain", "task", "workers", "episodes", "frame_skip", "image_size", "render_quality")},
        "frames_per_second": spread(rates),
        "frames": frames,
        "seconds": (time.perf_counter() - began) / repeats,
        "render_backend": attributes["render_backend"],
    }
