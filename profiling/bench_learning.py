"""Compare what two models learn in the same processor time: ours and a peer, trained on the same data, split, threads and machine.

For each seed the two train in processes of their own that take turns (SIGSTOP and SIGCONT), until each has spent the budget in processor
seconds. Ours is trained as `aime_fast.train` trains it, with its latent phase within the budget; the peer is a world model that TorchRL
ships (docs/learning.md says how it was tuned). Both are then measured by the same code on the same clips of test episodes. The folder gets
learning.json (everything, by seed), learning.md (one table), curves.png (validation, against seconds and against frames) and films.png
(rows: truth, then each model). Benches of single seeds, made side by side, are joined by --join.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aime_fast.cli import parse_config
from aime_fast.config import LATENT_UPDATES, PICTURE_SHARE, PRESETS, Config, to_dict
from aime_fast.errors import UserError
from aime_fast.runtime.provenance import version
from profiling.learning.scores import add_clip_options
from profiling.learning.turns import environment, python, take_turns
from profiling.machine import describe, title, write_json

PEERS = ("dreamer_v3",)
LATENT_SHARE = 0.7  # most of the budget that the latent phase may take; of more, fewer updates are made
POINTS = 10  # of a curve, about
COSTED, COSTED_LATENT = 8, (20, 160)  # updates by which the cost of ours is measured: of pictures, joint ones, of two latent phases


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench learning`."""
    parser.add_argument("--data", metavar="FILE", help="HDF5 file or folder, or synthetic")
    parser.add_argument("--minutes", type=float, metavar="M", help="processor minutes of training for each model and seed")
    parser.add_argument(
        "--join", nargs="+", metavar="FOLDER", help="instead: one table of the results of these benches, which differ in seeds"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each model a seed; default 0")
    parser.add_argument("--peer", choices=PEERS, default=PEERS[0])
    parser.add_argument("--only", choices=("ours", "peer"), help="train and measure one of the two")
    parser.add_argument("--tier", choices=tuple(PRESETS), default="1", help="of ours; default 1")
    parser.add_argument("--ours", default="", metavar="FLAGS", help="flags of aime_fast.train for ours, in quotes")
    parser.add_argument("--peer-config", default="{}", metavar="JSON", help="fields of the peer's config that differ from its defaults")
    parser.add_argument("--threads", type=int, metavar="T", help="threads of each; default: all cores")
    parser.add_argument("--turn", type=float, default=60.0, metavar="S", help="processor seconds of a turn; default 60")
    add_clip_options(parser)
    parser.add_argument("--out", default="runs/bench-learning", metavar="FOLDER", help="default runs/bench-learning")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Train, measure, print and write; returns the exit status."""
    out, threads = Path(options.out), options.threads or torch.get_num_threads()
    clips = {"clips": {name: getattr(options, name) for name in ("context", "horizon", "clips", "samples")}}
    if options.join:
        head, results = join(options.join, usage_error)
        write(out, clips | head, results)
        shutil.copyfile(Path(options.join[0]) / "films.png", out / "films.png")
        print((out / "learning.md").read_text())
        return 0
    if options.data is None or options.minutes is None:
        usage_error("learning: --data and --minutes are needed, or --join")
    if not Path("/proc/self/stat").exists():
        usage_error("learning: processes take turns by what /proc says of them; run it on Linux")
    for name, value in (("minutes", options.minutes), ("turn", options.turn), ("threads", threads)):
        if not value > 0:
            usage_error(f"--{name} {value:g}: expected more than 0")
    if any(out.glob("seed*")):
        usage_error(f"--out {out}: results of an earlier bench are there; name another folder, or remove it")
    torch.set_num_threads(threads)
    flags = ["--tier", options.tier, "--data", options.data, *shlex.split(options.ours)]
    config = parse_config("python -m aime_fast.train", "The flags of --ours.", flags)
    head = describe("cpu")
    head["versions"] |= {name: version(name) for name in ("torchrl", "tensordict")}
    head |= {"minutes": options.minutes, "threads": threads, "config": to_dict(config)} | clips
    print(f"{title(torch.device('cpu'))}, torch {torch.__version__}, torchrl {version('torchrl')}", flush=True)
    try:
        head["costs"] = None if options.only == "peer" else costs(config, threads, out)
        results = []
        for seed in options.seeds:
            results.append(one_seed(replace(config, run=replace(config.run, seed=seed)), options, threads, head["costs"], out))
            write(out, head, results)
    except (UserError, RuntimeError, ValueError) as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    print((out / "learning.md").read_text())
    return 0


def join(folders: list[str], usage_error: Callable[[str], Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(head of the first, results by seed) of benches in folders of their own; what must be equal is compared."""
    found = []
    for folder in folders:
        try:
            found.append(json.loads((Path(folder) / "learning.json").read_text()))
        except OSError:
            usage_error(f"--join {folder}: there is no learning.json")
    for folder, other in zip(folders, found):
        for name in ("git_commit", "machine", "minutes", "threads", "config"):
            if other[name] != found[0][name]:
                usage_error(f"--join {folder}: its {name} is not that of {folders[0]}")
    results = sorted((result for each in found for result in each["seeds"]), key=lambda result: result["seed"])
    seeds = [result["seed"] for result in results]
    if len({*seeds}) < len(seeds):
        usage_error(f"--join: a seed occurs twice in {', '.join(map(str, seeds))}")
    return found[0], results


def costs(config: Config, threads: int, out: Path) -> dict[str, float]:
    """What the parts of our training cost, see `learning.ours.measure`."""
    spec = _spec(out / "costs", {"config": to_dict(config), "threads": threads, "updates": COSTED, "latent_updates": COSTED_LATENT})
    take_turns(
        {"costs": python("profiling.learning.ours", "measure", spec, str(out / "costs"))}, out / "costs", math.inf, environment(threads)
    )
    found = json.loads((out / "costs" / "costs.json").read_text())
    shutil.rmtree(out / "costs")
    return found


class Plan(NamedTuple):
    """How a budget is divided."""

    pictures: int  # steps of encoder, decoder and perceiver alone
    joint: int  # joint updates, as many as are expected
    latent: int  # updates of the latent phase
    stop: float  # processor seconds at which the joint updates end


def plan(seconds: float, costs: dict[str, float], pictures: int | None, latent: int | None) -> Plan:
    """The plan of a budget.

    `pictures` and `latent` are the updates that are wanted, of the latter at most so many; None: for each joint update as many as
    training takes by itself.
    """
    begin, for_each = costs["latent_begin"], PICTURE_SHARE / (1 - PICTURE_SHARE)
    fixed = (pictures or 0) * costs["picture_step"]
    each = costs["update"] + (for_each * costs["picture_step"] if pictures is None else 0.0)  # joint update with its picture steps
    if latent is None:
        latent = int(LATENT_UPDATES * (seconds - begin - fixed) / (each + LATENT_UPDATES * costs["latent_update"]))
    most = LATENT_SHARE * seconds - begin
    if costs["latent_update"] > 0:
        latent = min(latent, int(most / costs["latent_update"]))
    latent = max(0, latent) if most > 0 else 0
    stop = seconds - (begin + latent * costs["latent_update"] if latent else 0.0)
    if pictures is None:
        pictures = int(for_each * stop / each)
    return Plan(pictures, max(0, int((stop - pictures * costs["picture_step"]) / costs["update"])), latent, stop)


def one_seed(config: Config, options: argparse.Namespace, threads: int, cost: dict[str, float] | None, out: Path) -> dict[str, Any]:
    """Train and measure both models with one seed: {seed, seconds (wall), contestants: {name: {cost, test, curve, ...}}}."""
    began, folder, seconds = time.perf_counter(), out / f"seed{config.run.seed}", 60 * options.minutes
    commands = {}
    if options.only != "peer":
        division = plan(seconds, cost, config.optim.picture_steps if config.data.stills else 0, config.optim.latent_phase_updates)
        # Where the learning rate falls by a schedule, it falls over the updates that the budget is expected to give.
        expected = max(1, division.pictures + division.joint)
        run = replace(config.run, checkpoint_every=max(1, expected // POINTS))
        optim = replace(config.optim, picture_steps=division.pictures, latent_phase_updates=division.latent)
        steps = 10**9 if config.optim.schedule == "constant" else expected
        given = {"config": to_dict(replace(config, run=run, optim=optim)), "threads": threads, "steps": steps}
        spec = _spec(
            folder / "ours",
            given | {"seconds": seconds, "stop": division.stop, "costs": cost, "most_latent": config.optim.latent_phase_updates},
        )
        commands["ours"] = python("profiling.learning.ours", "train", spec, str(folder / "ours"))
    if options.only != "ours":
        peer = {"peer": json.loads(options.peer_config), "seconds": seconds, "points": POINTS}
        spec = _spec(folder / options.peer, {"config": to_dict(config), "threads": threads} | peer)
        commands[options.peer] = python("profiling.learning.peer", spec, str(folder / options.peer))
    take_turns(commands, folder, options.turn, environment(threads))
    contestants = measure(config, options, folder, list(commands))
    return {"seed": config.run.seed, "seconds": time.perf_counter() - began, "contestants": contestants}


def measure(config: Config, options: argparse.Namespace, folder: Path, names: list[str]) -> dict[str, Any]:
    """The measures of both models; the checkpoints of their curves are deleted, the last ones stay. Writes films.png."""
    from aime_fast.training.checkpoint import list_checkpoints
    from profiling.learning.output import write_films
    from profiling.learning.scores import hold_out, measure, measure_point

    held = hold_out(config, options.context, options.horizon, options.clips)
    found, models = {}, {}
    for name in names:
        *points, last = json.loads((folder / name / "points.json").read_text())
        model, facts = _load(name, last["checkpoint"], held)
        curve = []
        for point in points:
            earlier = _load(name, point["checkpoint"])[0]
            if "latents" in facts:  # the whole curve is of one reading of the distributions
                earlier.latents = facts["latents"]
            curve.append(_place(point) | measure_point(earlier, held))
            Path(point["checkpoint"]).unlink()
        curve.append(_place(last) | measure_point(model, held))
        for checkpoint in list_checkpoints(folder / name / "run")[:-1]:
            checkpoint.unlink()
        models[name] = model
        cost = _place(last)
        cost["parameters"] = sum(parameter.numel() for parameter in getattr(model, "averaged", model).parameters())
        found[name] = {"cost": cost, "test": measure(model, held, options.samples), "curve": curve} | facts
        print(f"seed {config.run.seed}, {name}: {cost['seconds']:.0f} processor seconds, {cost['updates']} joint updates", flush=True)
    write_films(folder / "films.png", models, held.scored)
    return found


def _place(point: dict[str, Any]) -> dict[str, Any]:
    return {key: point[key] for key in ("seconds", "updates", "frames")}


def _load(name: str, checkpoint: str, held: Any = None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(the model of a checkpoint, facts about it). With `held` the peer chooses by validation clips what stands for a distribution."""
    if name == "ours":
        from aime_fast.training.checkpoint import load_model

        model, _, info = load_model(checkpoint)
        return model, {"latent_phase_updates": info["latent_phase_updates"]}
    from profiling.learning.peer import load

    peer = load(checkpoint)
    if held is None:
        return peer, {}
    clips = held.validation
    errors = peer.choose_latents(clips.pixels[:, : clips.context], clips.actions, clips.pixels[:, clips.context :])
    return peer, {"latents": peer.latents, "validation_errors": errors, "config": asdict(peer.config)}


def write(out: Path, head: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the files of all seeds so far."""
    from profiling.learning.output import summary, table, write_curves

    found = summary(results)
    write_json(out / "learning.json", head | {"table": found, "seeds": results})
    versions, machine, clips = head["versions"], head["machine"], head["clips"]
    lines = [
        f"{head['minutes']:g} processor minutes for each model and seed, seeds {' '.join(str(result['seed']) for result in results)}; "
        f"CPU, {head['threads']} threads, {machine['processor']}; torch {versions['torch']}, torchrl {versions['torchrl']}; "
        f"commit {head['git_commit']}.",
        f"Test episodes of {Path(head['config']['data']['data']).name}: {clips['context']} frames observed, {clips['horizon']} predicted. "
        "Mean over seeds and, of several, the range.",
    ]
    (out / "learning.md").write_text(table(found, lines))
    write_curves(out / "curves.png", results)
    first = out / f"seed{results[0]['seed']}" / "films.png"
    if first.exists():
        first.replace(out / "films.png")


def _spec(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "spec.json"
    write_json(path, content)
    return str(path)
