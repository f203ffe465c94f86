"""Check and measure everything with one command: `python -m profiling.suite --out DIR [--minutes N] [--resume] [--cache DIR]`.

Runs the parts of `PARTS` that fit the device, the most valuable first, each as a process with a time limit. No part starts after
`--minutes`, and the limit of a part is cut to what is left of them; those that need longer than that are run by the same command with
`--resume`, which goes on with what has not passed yet. A part that fails or runs out of time does not stop the next.

Writes to DIR what each part measures (`NAME.json`, as it comes), the output of each part (`PART.log`) and `summary.json`: the machine and
the outcome, seconds, command and commit of each part. `--cache` keeps what Inductor and Triton compile in one folder, which can travel to
the next machine. The exit status is 1 if a part that it ran failed.
Needs PyTorch, Triton and NumPy; what else a part needs and is not installed leaves it out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from profiling.machine import ROOT, describe, machine, title, write_json

DEVICES = {"cpu": 2.0, "cuda": 1.0}  # by how much the limits of the parts are longer there


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the suite."""

    name: str
    arguments: str  # of Python, as in a shell; {out} and {device} are replaced
    limit: float  # seconds, on CUDA
    quick: str = ""  # arguments that `--quick` adds
    devices: tuple[str, ...] = tuple(DEVICES)
    needs: tuple[str, ...] = ()  # modules without which the part is left out
    where_installed: tuple[tuple[str, str], ...] = ()  # (module, arguments that it adds)

    def words(self, out: Path, device: str, quick: bool) -> list[str]:
        """The arguments of Python."""
        added = [arguments for module, arguments in self.where_installed if _installed(module)]
        line = " ".join([self.arguments, *added, self.quick if quick else ""])
        return [word.format(out=out, device=device) for word in shlex.split(line)]


def _train(name: str, file: str, limit: float, arguments: str, device: str = "cuda") -> Part:
    command = f"-m profiling.bench train --device {{device}} --json {{out}}/{file} {arguments}"
    return Part(name, command, limit, quick="--quick", devices=(device,), needs=("tensordict",))


PARTS = (  # in the order in which they run
    Part("environment", "-m profiling.ceilings --device {device} --json {out}/environment.json", 60),
    Part("check", "-m profiling.check --device {device} --json {out}/check.json", 150),
    Part(
        "tests",
        "-m pytest -m cuda -p no:cacheprovider --continue-on-collection-errors",  # a test file may need more than is installed
        150,
        devices=("cuda",),
        needs=("pytest", "tensordict"),
        where_installed=(("pytest_timeout", "--timeout 90"), ("xdist", "-n 4")),
    ),
    _train("tier1", "train-1.json", 150, "--tier debug 1 --no-ladder --compile off capture --precision fp32 bf16 --sample 2"),
    Part(
        "kernels",
        "-m profiling.bench kernels --device {device} --seconds 150 --json {out}/kernels.json --picture {out}/kernels.png",
        200,
        quick="--quick",
    ),
    _train("tiers", "train-23.json", 200, "--tier 2 3 --no-ladder --compile off capture --sample 2"),
    _train("ladder", "ladder.json", 240, "--tier 1 --ladder --sample 2"),  # last: it compiles for minutes
    _train("train", "train.json", 120, "--tier 1 --compile off on --sample 5", device="cpu"),
)


def run_part(part: Part, words: Sequence[str], log: Path, environment: dict[str, str], limit: float) -> tuple[str, float]:
    """Run one part for `limit` seconds at most, its output in `log`; returns its outcome and seconds."""
    missing = [name for name in part.needs if not _installed(name)]
    if missing:
        return f"left out: {', '.join(missing)} not installed", 0.0
    if limit <= 0:
        return "left out: no time left; use --resume", 0.0
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        # In its own session, so that a kill also ends its children.
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
            outcome = "passed" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: not done after {limit:.0f} s"
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return outcome, round(time.perf_counter() - began, 1)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _earlier(summary: Path, device: str) -> dict[str, dict[str, Any]]:
    """The parts of an earlier run, by name; none if there was none. Raises ValueError if it was on another device."""
    if not summary.exists():
        return {}
    written = json.loads(summary.read_text(encoding="utf-8"))
    before, now = ((facts["device"], facts.get("gpu")) for facts in (written["machine"], machine(torch.device(device))))
    if before != now:
        raise ValueError(f"--resume: {summary} is of {before[1] or before[0]}, this run of {now[1] or now[0]}; use another --out")
    return {entry["part"]: entry for entry in written["parts"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options and run the parts; returns the exit status."""
    began = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m profiling.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write; created if missing")
    parser.add_argument("--device", choices=tuple(DEVICES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help=f"run only these: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--minutes", type=float, default=9, metavar="N", help="for all parts together; default 9")
    parser.add_argument("--resume", action="store_true", help="run only what has not passed in DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where Inductor and Triton keep what they compile")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    chosen = {part.name: part for part in PARTS if options.device in part.devices}
    unknown = set(options.parts or ()) - set(chosen)
    if unknown:
        parser.error(f"--parts {' '.join(sorted(unknown))}: on {options.device} there are {' '.join(chosen)}")
    out, environment = options.out.resolve(), dict(os.environ)
    if options.cache:
        cache = options.cache.resolve()
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    try:
        entries = _earlier(out / "summary.json", options.device) if options.resume else {}
    except ValueError as error:
        parser.error(str(error))
    out.mkdir(parents=True, exist_ok=True)

    print(title(torch.device(options.device)), flush=True)
    head, failed = describe(options.device), False
    for name, part in chosen.items():
        if options.parts and name not in options.parts:
            continue
        if entries.get(name, {}).get("outcome") == "passed":
            print(f"{name:<12} passed before", flush=True)
            continue
        words, log = part.words(out, options.device, options.quick), out / f"{name}.log"
        limit = min(part.limit * DEVICES[options.device], 60 * options.minutes - (time.perf_counter() - began))
        outcome, seconds = run_part(part, words, log, environment, limit)
        entry = {"part": name, "outcome": outcome, "failed": outcome.startswith("FAILED"), "seconds": seconds}
        entry |= {"command": shlex.join(["python", *words]), "git_commit": head["git_commit"]}
        if not outcome.startswith("left out") or name not in entries:  # of a part that could not run, an earlier entry says more
            entries[name] = entry
        write_json(out / "summary.json", head | {"parts": [entries[each] for each in chosen if each in entries]})
        print(f"{name:<12} {seconds:6.1f} s  {outcome}", flush=True)
        if entry["failed"]:
            failed = True
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            print("".join(f"    {line[:220]}\n" for line in tail), end="", flush=True)
    print(f"written to {out}")
    return int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the running part ends too
    sys.exit(main())
