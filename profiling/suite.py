"""The whole evidence from one command: `python -m profiling.suite --out DIR [--device cpu|cuda] [--quick]`.

Checks the kernels, measures them, and measures the training step where its benchmark and what that needs are installed. Each part is a
process with a time limit, together under 9 minutes; a part that fails or runs out of time does not stop the next, and the last one has
what the others left. DIR receives `check.json`, `kernels.json`, `kernels.png`, `train.json`, what each part printed (`*.log`), and
`summary.json`. Exit status 1 if any part failed.
Needs PyTorch, Triton and NumPy; uses Matplotlib, vector-quantize-pytorch and torchjd where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from profiling.machine import ROOT, describe, title, write_json


@dataclasses.dataclass(frozen=True)
class Part:
    """A process of the suite."""

    name: str
    arguments: tuple[str, ...]  # of python; {out} and {device} are filled in
    limit: float  # seconds
    needs: tuple[str, ...] = ()  # modules without which the part is left out


LIMIT = 9 * 60 - 5.0  # seconds for all parts

PARTS = (
    Part("check", ("-m", "profiling.check", "--device", "{device}", "--json", "{out}/check.json"), 180),
    Part(
        "kernels",
        (
            *("-m", "profiling.bench", "kernels", "--device", "{device}", "--seconds", "240"),
            *("--json", "{out}/kernels.json", "--picture", "{out}/kernels.png"),
        ),
        290,
    ),
    Part(
        "train",
        (
            *("-m", "profiling.bench", "train", "--device", "{device}", "--tier", "1", "--compile", "off", "graph", "--sample", "5"),
            *("--json", "{out}/train.json"),
        ),
        60,
        needs=("profiling.bench_train", "tensordict"),
    ),
)


def run_part(part: Part, out: Path, device: str, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Run one part, its output into `out/NAME.log`; what became of it."""
    missing = [name for name in part.needs if not _installed(name)]
    if missing:
        return {"part": part.name, "outcome": f"left out: {', '.join(missing)} not installed", "failed": False, "seconds": 0.0}
    command = [sys.executable, *(word.format(out=out, device=device) for word in part.arguments), *extra]
    began = time.perf_counter()
    with open(out / f"{part.name}.log", "w", encoding="utf-8") as log:
        # In a session of its own, so that its own children end with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(part.limit)
            outcome = "passed" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            status, outcome = 124, f"FAILED: not done after {part.limit:.0f} s"
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return {"part": part.name, "outcome": outcome, "failed": status != 0, "seconds": round(time.perf_counter() - began, 1)}


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options and run every part; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; made if it is not there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)

    print(title(torch.device(options.device)), flush=True)
    ended, head = [], describe(options.device)
    began = time.perf_counter()
    for part in PARTS:
        if part is PARTS[-1]:
            part = dataclasses.replace(part, limit=max(part.limit, LIMIT - (time.perf_counter() - began)))
        extra = ("--quick",) if options.quick and part.name != "check" else ()
        ended.append(run_part(part, out, options.device, extra))
        write_json(out / "summary.json", head | {"parts": ended, "passed": not any(part["failed"] for part in ended)})
        print(f"{ended[-1]['part']:<8} {ended[-1]['seconds']:6.1f} s  {ended[-1]['outcome']}", flush=True)
        if ended[-1]["failed"]:
            tail = (out / f"{part.name}.log").read_text(encoding="utf-8").splitlines()[-15:]
            print("".join(f"    {line[:220]}\n" for line in tail), end="", flush=True)
    print(f"written to {out}")
    return int(any(part["failed"] for part in ended))


if __name__ == "__main__":
    sys.exit(main())
