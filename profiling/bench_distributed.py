"""Measure how the speed of an update grows with the processes that make it together, on this machine.

Strong: they share the tier's batch. Weak: each has a batch of its own. Processors are shared out: each process gets --threads divided by
their number; on GPUs each has one. Numbers of processes take turns, since a machine's speed drifts. `waiting` is the share of an update
that a process spends in messages to the others and in waiting for the slowest; on GPUs it is not known to the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from aime_fast.config import PRESETS, Config, from_dict, preset, to_dict
from aime_fast.errors import ConfigError
from aime_fast.runtime import ranks
from aime_fast.runtime.machine import choose_device
from aime_fast.training.settings import check_shares
from profiling.machine import describe, title, write_json
from profiling.steps import Updates, synchronize

TURNS = 3  # of each number of processes


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench distributed`."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of processes; default 1 2")
    parser.add_argument("--tier", choices=tuple(PRESETS), default="1", help="default 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="T", help="of all processes together; default: the cores")
    parser.add_argument("--cycles", type=int, default=2, metavar="C", help="cycles of updates in a turn; default 2")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Measure and print; returns the exit status."""
    for name in ("threads", "cycles"):
        if getattr(options, name) < 1:
            usage_error(f"--{name} {getattr(options, name)}: expected at least 1")
    if bad := [count for count in options.ranks if count < 1]:
        usage_error(f"--ranks {bad[0]}: expected at least 1")
    device = torch.device(options.device)
    base = preset(options.tier)
    run, optim = (
        dataclasses.replace(base.run, device=options.device, compile="off"),
        dataclasses.replace(base.optim, latent_phase_updates=0),
    )
    config = dataclasses.replace(base, run=run, optim=optim)
    for count in options.ranks:
        try:
            check_shares(config, count)
        except ConfigError as error:
            usage_error(f"--ranks {count}, --tier {options.tier}: {error}")
    print(f"{title(device)}, torch {torch.__version__}, tier {options.tier}; {TURNS} turns of {options.cycles} cycles", flush=True)
    plan = [("strong", count) for count in options.ranks] + [("weak", count) for count in options.ranks if count > 1]
    found: dict[tuple[str, int], list[dict[str, float]]] = {each: [] for each in plan}
    with TemporaryDirectory() as folder:
        for _ in range(TURNS):
            for scaling, count in plan:
                whole = config if scaling == "strong" else _larger(config, count)
                try:
                    found[scaling, count].append(launch(whole, count, max(1, options.threads // count), options.cycles, Path(folder)))
                except subprocess.CalledProcessError as error:
                    print(f"FAILED: {scaling}, {count} processes:\n{error.stderr[-2000:]}", flush=True)
                    return 1
    rows = [_row(scaling, count, samples) for (scaling, count), samples in found.items()]
    alone = next((row["frames_per_second"] for row in rows if row["ranks"] == 1), None)
    for row in rows:
        row["efficiency"] = row["frames_per_second"] / alone / (row["ranks"] if device.type == "cuda" else 1) if alone else None
        of_alone = "" if row["efficiency"] is None else f", {row['efficiency']:.2f} of one process"
        print(
            f"{row['scaling']:<6} {row['ranks']} processes, batch {row['batch']}: {row['frames_per_second']:.0f} frames/s{of_alone}, "
            f"waiting {row['waiting']:.0%}, {row['messages']:.1f} messages and {row['megabytes']:.1f} MB an update"
        )
    if options.json:
        write_json(options.json, {**describe(device), "tier": options.tier, "threads": options.threads, "rows": rows})
    return 0


def _larger(config: Config, count: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=count * config.data.batch_size))


def _row(scaling: str, count: int, samples: list[dict[str, float]]) -> dict[str, Any]:
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    return {"scaling": scaling, "ranks": count, **medians, "samples": samples}


def launch(config: Config, count: int, threads: int, cycles: int, folder: Path) -> dict[str, float]:
    """Frames a second, share of the time in waiting and batch size of so many processes. Raises CalledProcessError."""
    spec, out = folder / "spec.json", folder / "found.json"
    spec.write_text(json.dumps({"config": to_dict(config), "threads": threads, "cycles": cycles}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "profiling.bench_distributed", str(spec), str(out)]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    return json.loads(out.read_text())


def measure(spec: Path, out: Path) -> None:
    """What each of the processes does; the first writes what it has found."""
    given = json.loads(spec.read_text())
    config = from_dict(given["config"])
    torch.set_num_threads(given["threads"])
    with ranks.joined(choose_device(ranks.local_device(config.run.device)), config.run.messages):
        updates = Updates(config)
        for _ in range(updates.warm_up):
            updates()
        ranks.wait()
        synchronize(updates.device)
        began, before = time.perf_counter(), dataclasses.replace(ranks.traffic)
        for _ in range(given["cycles"] * updates.cycle):
            updates()
        synchronize(updates.device)
        seconds, made, traffic = time.perf_counter() - began, given["cycles"] * updates.cycle, ranks.traffic
        updates.close()
        if ranks.leads():
            found = {
                "frames_per_second": made * updates.frames / seconds, "waiting": (traffic.seconds - before.seconds) / seconds,
                "batch": config.data.batch_size, "messages": (traffic.messages - before.messages) / made,
                "megabytes": (traffic.bytes - before.bytes) / made / 1e6,
            }  # fmt: skip
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    measure(*map(Path, sys.argv[1:]))
