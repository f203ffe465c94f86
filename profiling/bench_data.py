"""Measure how many frames a second the loader serves, with nothing else running.

Without --data the frames are synthetic, in the shape of the tier; with it they come from an HDF5 file or a folder of files. The frames are
stored on the host and, in further rows with CUDA, on the device; each without and with prefetch. A sample of the speed is taken over a
tenth of a second. `unpack_seconds` is the time that filling the replay takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from aime_fast.config import PRESETS, DataConfig, preset
from aime_fast.data import DMCVBDataset, make_batches
from aime_fast.errors import DataError
from profiling.machine import describe, title
from profiling.rows import spread, write_rows
from profiling.steps import synchronize, with_synthetic_frames

WINDOW = 0.1  # seconds of a sample
RECORDED = ("domain", "task", "image_size", "frame_skip", "camera", "render_quality")  # taken from a file instead of the tier


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench data`."""
    parser.add_argument("--tier", choices=tuple(PRESETS), nargs="+", default=["1", "2", "3"], help="default: 1 2 3")
    parser.add_argument("--data", metavar="FILE", help="HDF5 file or folder; default: synthetic frames")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sample", type=float, default=2.0, metavar="N", help="seconds a row; default 2")
    parser.add_argument("--json", metavar="FILE", help="write the rows here, each with machine, versions, commit and command")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Measure, print and write; returns the exit status."""
    if options.device == "cuda" and not torch.cuda.is_available():
        usage_error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    device = torch.device(options.device)
    print(f"{title(device)}\n{'tier':<6}{'source':<12}{'replay':<8}{'prefetch':>8}{'frames/s':>12}{'p20':>12}{'p80':>12}{'unpack s':>10}")
    head, rows = describe(device), []
    for tier in options.tier:
        try:
            data = _data(tier, options.data)
            for replay in ("host", "device") if device.type == "cuda" else ("host",):
                for prefetch in (0, preset(tier).data.prefetch):
                    row = {"tier": tier} | measure(dataclasses.replace(data, replay=replay, prefetch=prefetch), device, options.sample)
                    rows.append(row)
                    speed = row["frames_per_second"]
                    print(
                        f"{tier:<6}{row['source']:<12}{replay:<8}{prefetch:>8}{speed['median']:>12.0f}{speed['p20']:>12.0f}"
                        f"{speed['p80']:>12.0f}{row['unpack_seconds']:>10.2f}",
                        flush=True,
                    )
        except DataError as error:
            usage_error(f"tier {tier}: {error}")
    write_rows(options.json, head, rows)
    return 0


def _data(tier: str, path: str | None) -> DataConfig:
    """The data settings of the tier, for the recording at `path` or, without one, for synthetic frames."""
    config = preset(tier)
    if path is None:
        return with_synthetic_frames(config).data
    recorded = DMCVBDataset(path, config.data.sequence_length).attributes
    return dataclasses.replace(config.data, data=path, **{name: recorded[name] for name in RECORDED if name in recorded})


def measure(data: DataConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """One row: batches taken without pause for `seconds`. Raises DataError as `make_batches` does."""
    began = time.perf_counter()
    batches, validation = make_batches(data, seed=0, device=device)
    validation.close()
    unpacked = time.perf_counter() - began
    try:
        for _ in range(2 + data.prefetch):
            next(batches)
        synchronize(device)
        rates, began = [], time.perf_counter()
        while not rates or time.perf_counter() - began < seconds:
            rates.append(_frames_per_second(batches, device))
    finally:
        batches.close()
    return {
        "device": device.type,
        "source": "synthetic" if data.data == "synthetic" else "HDF5",
        "replay": data.replay,
        "prefetch": data.prefetch,
        "frames_per_second": spread(rates),
        "frames_per_batch": data.batch_size * data.sequence_length,
        "image_size": data.image_size,
        "unpack_seconds": unpacked,
    }


def _frames_per_second(batches: Any, device: torch.device) -> float:
    """One sample: the time includes the arrival of the last batch on the device."""
    frames, began = 0, time.perf_counter()
    while time.perf_counter() - began < WINDOW:
        frames += next(batches)["pixels"].shape[:2].numel()
    synchronize(device)
    return frames / (time.perf_counter() - began)
