"""Check and measure everything with one command: `python -m profiling.suite --out DIR [--device cpu|cuda] [--quick]`.

Checks the kernels, measures them, and measures the training step if its requirements are installed. Each part is a process with a time
limit, all together under 9 minutes. A part that fails or runs out of time does not stop the next; the last part also gets the time that
the others left. Writes `check.json`, `kernels.json`, `kernels.png`, `train.json`, the output of each part (`*.log`) and `summary.json` to
DIR. The exit status is 1 if any part failed.
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
    """One process of the suite."""

    name: str
    arguments: tuple[str, ...]  # of the Python command; {out} and {device} are replaced
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
    """Run one part with its output in `out/NAME.log`; returns its name, outcome, failure and seconds."""
    missing = [name for name in part.needs if not _installed(name)]
    if missing:
        return {"part": part.name, "outcome": f"left out: {', '.join(missing)} not installed", "failed": False, "seconds": 0.0}
    command = [sys.executable, *(word.format(out=out, device=device) for word in part.arguments), *extra]
    began = time.perf_counter()
    with open(out / f"{part.name}.log", "w", encoding="utf-8") as log:
        # In its own session, so that a kill also ends its children.
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
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; created if missing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)

    print(title(torch.device(options.device)), flush=True)
    results, head = [], describe(options.device)
    began = time.perf_counter()
    for part in PARTS:
        if part is PARTS[-1]:
            part = dataclasses.replace(part, limit=max(part.limit, LIMIT - (time.perf_counter() - began)))
        extra = ("--quick",) if options.quick and part.name != "check" else ()
        result = run_part(part, out, options.device, extra)
        results.append(result)
        write_json(out / "summary.json", head | {"parts": results, "passed": not any(each["failed"] for each in results)})
        print(f"{result['part']:<8} {result['seconds']:6.1f} s  {result['outcome']}", flush=True)
        if result["failed"]:
            tail = (out / f"{part.name}.log").read_text(encoding="utf-8").splitlines()[-15:]
            print("".join(f"    {line[:220]}\n" for line in tail), end="", flush=True)
    print(f"written to {out}")
    return int(any(each["failed"] for each in results))


if __name__ == "__main__":
    sys.exit(main())
