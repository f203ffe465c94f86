"""What each pillar is worth: runs with one thing changed at a time, each trained and measured alike, over several seeds.

A run is trained by `aime_fast.train` with the flags of --flags; what is changed is in `profiling/pillars.py`, or is one of the settings
of --also. Its checkpoint, and a file with its measures on test episodes (or --part validation), are in OUT/VARIANT/seedN. A run whose file
is there is not made again, so that a bench goes on where it was stopped, and two may share a folder, with different seeds or variants. The
table is of all files in the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aime_fast.cli import parse_config
from aime_fast.config import PRESETS, Config, to_dict
from profiling.learning.output import cell, mean_and_range
from profiling.learning.scores import add_clip_options, rows
from profiling.learning.turns import environment, python, take_turns
from profiling.machine import describe, title, write_json
from profiling.pillars import VARIANTS

FLAGS = "--steps 240 --picture-steps 140 --latent-phase-updates 500"
OF_VALIDATION = {"loss/kl_z": "KL of z, nats", "loss/next_token": "next token, nats"}
# columns of the table, as `rows` and OF_VALIDATION name them
SHOWN = (
    "reconstruction, PSNR dB", "explained within 2 pixels of pole_1/tip, reconstruction", "gain on the better baseline, steps 5 to 16, dB",
    "smallest gain on the better baseline to step {horizon}, dB",
    "action-shuffle ratio", "sampled minus deterministic at step 5, dB", "position error of pole_1/tip, steps 1 to 16, pixels",
    "position error of pole_1/tip, steps 1 to {horizon}, pixels", "position error of cart, steps 1 to 16, pixels", *OF_VALIDATION.values(),
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench pillars`."""
    parser.add_argument("--data", required=True, metavar="FILE", help="HDF5 file or folder, or synthetic")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--also", nargs="+", default=[], metavar="FLAGS", help="of aime_fast.train, quoted: each makes runs beside")
    parser.add_argument(
        "--part", choices=("test", "validation"), default="test", help="episodes of the measures; settings are chosen on validation"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each variant a seed; default 0")
    parser.add_argument("--tier", choices=tuple(PRESETS), default="1", help="default 1")
    parser.add_argument("--flags", default=FLAGS, help=f"of aime_fast.train, in quotes; default {FLAGS}")
    parser.add_argument("--threads", type=int, metavar="T", help="threads of a run; default: all cores")
    add_clip_options(parser)
    parser.add_argument("--out", default="runs/bench-pillars", metavar="FOLDER", help="default runs/bench-pillars")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Train, measure, print and write; returns the exit status."""
    out, threads = Path(options.out), options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)  # as the runs: the head of the table names them
    flags = ["--tier", options.tier, "--data", options.data, *shlex.split(options.flags)]
    configs = {
        variant: parse_config(
            "python -m aime_fast.train", "The flags of --flags.", flags + (shlex.split(variant) if variant in options.also else [])
        )
        for variant in (*options.variants, *options.also)
    }
    for seed in options.seeds:
        for variant, config in configs.items():
            folder = out / re.sub(r"[^\w.]+", "-", variant).strip("-") / f"seed{seed}"
            if (folder / "measured.json").exists():
                if _settings(json.loads((folder / "spec.json").read_text())) != _settings(_spec(config, seed, threads, options, folder)):
                    usage_error(f"--out {out}: {folder} was measured with other settings; name another folder")
                continue
            print(f"seed {seed}: {in_words(variant)}", flush=True)
            try:
                train(variant, config, seed, threads, options, folder)
            except RuntimeError as error:
                print(f"FAILED: {error}", flush=True)
                return 1
            found = [json.loads(path.read_text()) for path in sorted(out.glob("*/seed*/measured.json"))]
            head = describe("cpu") | {name: getattr(options, name) for name in ("flags", "horizon", "part")}
            head |= {"threads": threads, "config": to_dict(next(iter(configs.values())))}
            write_json(out / "pillars.json", head | {"runs": found})
            commits = ", ".join(sorted({str(run["commit"]) for run in found}))  # more than one where another version went on in OUT
            (out / "pillars.md").write_text(table(found, options.horizon, f"{title(torch.device('cpu'))}; commit {commits}."))
    print((out / "pillars.md").read_text())
    return 0


def in_words(variant: str) -> str:
    """What is different in a variant: a sentence, or the flags themselves."""
    return VARIANTS[variant][0] if variant in VARIANTS else f"`{variant}`"


def train(variant: str, config: Config, seed: int, threads: int, options: argparse.Namespace, folder: Path) -> None:
    """One run, in a process of its own. Raises RuntimeError where it fails; it names the log."""
    write_json(folder / "spec.json", _spec(config, seed, threads, options, folder))
    command = python("profiling.pillars", variant, str(folder / "spec.json"), str(folder / "measured.json"))
    take_turns({"run": command}, folder, math.inf, environment(threads))


def _spec(config: Config, seed: int, threads: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What `profiling.pillars` is given."""
    run = replace(
        config.run, seed=seed, threads=threads, device="cpu", run_dir=str(folder / "run"), resume=(folder / "run").exists(),
        validate_every=0, sample_every=0, keep_checkpoints=1,
    )  # fmt: skip
    given = {name: getattr(options, name) for name in ("context", "horizon", "clips", "samples", "part")}
    return given | {"config": to_dict(replace(config, run=run))}


def _settings(spec: dict[str, Any]) -> dict[str, Any]:
    """What of a spec says what was measured: not where, nor by how many threads."""
    run = {name: value for name, value in spec["config"]["run"].items() if name not in ("run_dir", "resume", "threads")}
    return json.loads(json.dumps(spec | {"config": spec["config"] | {"run": run}}))


def table(runs: Sequence[dict[str, Any]], horizon: int, head: str) -> str:
    """Markdown: a row a variant, a column a measure, the mean over seeds and, of several, the range."""
    columns = [label.format(horizon=horizon) for label in SHOWN]
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        measured = rows(run["films"]) | {label: run["validation"][name] for name, label in OF_VALIDATION.items()}
        for label in columns:
            if (value := measured.get(label)) is not None:
                values.setdefault(run["variant"], {}).setdefault(label, []).append(value)
    columns = [label for label in columns if any(label in found for found in values.values())]
    lines = [head, "", f"| {' | '.join(('', *columns, 'seeds'))} |", "|---" * (len(columns) + 2) + "|"]
    for variant in sorted(values, key=lambda name: list(VARIANTS).index(name) if name in VARIANTS else len(VARIANTS)):
        cells = [cell(mean_and_range(values[variant].get(label, []))) for label in columns]
        seeds = sum(run["variant"] == variant for run in runs)
        lines.append(f"| {' | '.join((in_words(variant), *cells, str(seeds)))} |")
    return "\n".join(lines) + "\n"
