"""Measure a conversion: frames a second, and the largest memory of its processes.

--frames frames of --data are laid out as a folder of npz episodes, as the Dreamer family writes them: each episode of --data once, and as
many names for it (hard links) as it takes. Then `python -m aime_fast.convert` runs on the folder as a process of its own. Its time is that
of the clock, from its start to its end, imports and the check of the written file included.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aime_fast.data import DMCVBDataset
from aime_fast.errors import DataError
from profiling.machine import describe, title
from profiling.rows import write_rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench convert`."""
    parser.add_argument("--data", required=True, metavar="FILE", help="HDF5 file or folder whose episodes are laid out")
    parser.add_argument("--frames", type=int, default=100_000, metavar="N", help="at least so many; default 100000")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="one row each; default 1 2")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where the npz and the file lie; default: the system's temporary one"
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows here, each with machine, versions, commit and command")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Measure, print and write; returns the exit status."""
    rows = []
    print(f"{title(torch.device('cpu'))}\n{'workers':>8}{'frames':>10}{'seconds':>10}{'frames/s':>10}{'largest process, MiB':>22}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        try:
            frames, size = lay_out(options.data, options.frames, Path(folder) / "npz")
        except DataError as error:
            usage_error(str(error))
        for workers in options.workers:
            command = [sys.executable, "-m", "aime_fast.convert", f"{folder}/npz", "--out", f"{folder}/out.h5", "--image-size", str(size)]
            began = time.perf_counter()
            done = subprocess.run([*command, "--workers", str(workers), "--overwrite", "--no-progress"], capture_output=True, text=True)
            seconds = time.perf_counter() - began
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return done.returncode
            largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of all so far
            rows.append(
                {"workers": workers, "frames": frames, "seconds": seconds, "frames_per_second": frames / seconds, "largest_mib": largest}
            )
            print(f"{workers:>8}{frames:>10}{seconds:>10.1f}{frames / seconds:>10.0f}{largest:>22.0f}", flush=True)
    write_rows(options.json, describe("cpu"), rows)
    return 0


def lay_out(data: str, frames: int, folder: Path) -> tuple[int, int]:
    """Write npz episodes of at least so many frames; returns (frames, H = W). Raises DataError as `DMCVBDataset`."""
    source = DMCVBDataset(data, 2)
    folder.mkdir()
    made = 0
    for number in count():
        if made >= frames:
            return made, source.image_size
        i, path = number % source.num_episodes, folder / f"{number:07d}.npz"
        if number == i:
            episode = source.read_episode(i)
            leading = {name: np.roll(episode[name].numpy(), 1, 0) for name in ("action", "reward")}  # of the first row nothing is read
            pixels = episode["pixels"].permute(0, 2, 3, 1).numpy()
            np.savez_compressed(path, image=pixels, **leading, is_first=np.arange(len(pixels)) == 0)
        else:
            os.link(folder / f"{i:07d}.npz", path)
        made += source.lengths[i] - 1
