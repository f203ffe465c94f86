"""Evaluate runs on their test episodes: `python -m aime_fast.evaluate RUN_OR_CHECKPOINT ... [--context 8 --horizon 50 --samples 10 ...]`.

Writes evaluation.json, prediction.png and prediction.mp4 of each run, and prints the tables; of several runs also mean and spread. With
--returns the policy of an online run plays, or with --policy plan a planner: returns.json, returns.mp4 and returns.png.
docs/evaluation.md says what each number means.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from tyro.conf import Positional

from aime_fast.cli import parse_arguments, run_command
from aime_fast.config import Compile
from aime_fast.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import nn

    from aime_fast.config import DataConfig
    from aime_fast.data import SequenceBatches
    from aime_fast.data.split import Split
    from aime_fast.evaluation.clips import Clips
    from aime_fast.evaluation.positions import PositionReader


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and on how much."""

    run: Positional[tuple[str, ...]]  # run directories, or checkpoints of them; in Python a string is one run
    part: Literal["test", "validation"] = "test"  # episodes: those that nothing in training has read, or those that validate
    episodes: int | None = None  # number of episodes; none: all
    clips: int = 8  # open-loop clips cut from each episode
    context: int = 8  # observed frames
    horizon: int = 50  # frames predicted from actions alone
    samples: int = 10  # sampled predictions of each clip
    seed: int = 0  # of the samples
    batch: int = 16  # clips predicted at once
    out: str | None = None  # folder for the results, of several runs for mean and spread; none: evaluation/ in the run directory
    probes: bool = True  # also measure what each pillar is worth
    returns: bool = False  # play --episodes episodes (10 by default) with the run's policy instead, and say what they earn
    policy: Literal["actor", "plan"] = "actor"  # of --returns: the run's actor, or a planner in its world model, with its critic if any
    data: str | None = None  # other data of the same task, split alike, without training episodes of the run; none: those of the run
    device: str = "auto"  # cpu, cuda or auto
    compile: Compile | Literal["best"] = "off"  # of imagined frames; pays for long or many roll-outs; bare: best for the device
    ema: bool = True  # the moving average of the weights, or the weights themselves


class HeldOut(NamedTuple):
    """Episodes on the host, and what is known about positions in them."""

    episodes: list[TensorDict]  # to evaluate
    reader: PositionReader | str  # of positions, or why there is none: "not measured: ..."
    known: list[TensorDict]  # training episodes whose latents are compared with positions; empty without positions


def evaluate(options: EvaluateConfig) -> dict:
    """Evaluates one run, or several, and writes the files. Returns the content of evaluation.json, of several runs that of the summary."""
    from aime_fast.evaluation.several import print_summary, summarise
    from aime_fast.runtime.files import write_text

    check(options)
    runs = (options.run,) if isinstance(options.run, str) else options.run
    folders = {path.parent if path.is_file() else path for path in (Path(run).resolve() for run in runs)}
    if not runs or len(folders) < len(runs):
        raise ConfigError("give one run, or several in different folders: each is written into evaluation/ of its folder")
    if options.returns:
        if options.out and len(runs) > 1:
            raise ConfigError(f"--out {options.out}: with --returns each run is written into evaluation/ of its own folder; leave it out")
        return {run: evaluate_returns(options, run) for run in runs}
    if len(runs) == 1:
        return evaluate_run(options, runs[0], options.out)
    if missing := [run for run in runs if not Path(run).exists()]:
        raise CheckpointError(f"{missing[0]}: neither a run's folder nor a checkpoint file")
    summary = summarise({run: evaluate_run(options, run, None) for run in runs})
    print_summary(summary)
    if options.out:
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "evaluation.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
        print(f"\nwritten to {out}: evaluation.json")
    else:
        print("\nmean and spread are not written; give --out FOLDER for that")
    return summary


def evaluate_run(options: EvaluateConfig, run: str, folder: str | None) -> dict:
    """Evaluates one run, writes its files into `folder` or evaluation/ in its directory. Returns the content of evaluation.json."""
    from aime_fast.data import make_batches
    from aime_fast.data.split import Split
    from aime_fast.evaluation.clips import cut_clips
    from aime_fast.evaluation.explained import explain_reconstruction
    from aime_fast.evaluation.lpips import find_lpips
    from aime_fast.evaluation.open_loop import evaluate_prediction
    from aime_fast.evaluation.outcomes import evaluate_outcomes
    from aime_fast.evaluation.pictures import write_prediction
    from aime_fast.evaluation.tables import print_tables
    from aime_fast.evaluation.validation import evaluate_sequences
    from aime_fast.runtime.files import write_text
    from aime_fast.runtime.machine import choose_compile, choose_device, choose_kernels, choose_tf32, keep_freed_memory
    from aime_fast.runtime.provenance import git_commit, version
    from aime_fast.training.checkpoint import load_model

    began = time.perf_counter()
    device = choose_device(options.device)
    choose_kernels(None)
    if device.type == "cpu":
        keep_freed_memory()
    model, config, info = load_model(run, device, ema=options.ema)
    choose_tf32(config.run.tf32, config.run.precision)
    model.compile_imagination(choose_compile(options.compile, device))
    data = replace(config.data, data=options.data or config.data.data, replay="auto")  # this may be a smaller GPU
    split = None if options.data else info["split"]
    parts = dict(zip(Split._fields, make_batches(data, config.run.seed, device, split, Split._fields)))
    try:
        training, evaluated = choose_parts(parts, options, info["split"])
        mean_frame = training.mean_frame()
        held = held_out(data, training, evaluated, options.episodes)
        episodes, reader = held.episodes, held.reader
        try:
            clips = cut_clips(episodes, options.context, options.horizon, options.clips)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        lpips = find_lpips(device)
        missing = {name: found for name, found in (("lpips", lpips), ("positions", reader)) if isinstance(found, str)}
        open_loop = evaluate_prediction(
            model, clips, mean_frame, options.samples, options.batch,
            reader=None if "positions" in missing else reader, lpips=None if "lpips" in missing else lpips, seed=options.seed,
        )  # fmt: skip
        sequences = evaluate_sequences(model, evaluated.one_pass(), mean_frame, config.model.codebook_size, options.seed)
        learnt = config.loss.lambda_outcome > 0
        outcomes = evaluate_outcomes(model, clips, training.mean_reward(), options.batch) if learnt else {"clips": 0}
        if "positions" not in missing:
            near = explain_reconstruction(model, clips, mean_frame, reader.names, options.batch)
            sequences["reconstruction"]["explained_near"] = near
        result = {
            "checkpoint": str(info["checkpoint"]),
            "step": info["step"],
            "latent_phase_updates": info["latent_phase_updates"],
            "ema": options.ema,
            "data": data.data,
            "part": options.part,
            "episodes": len(episodes),
            "seed": options.seed,
            "device": str(device),
            "torch": version("torch"),
            "commit": git_commit(),
            **sequences,
            "open_loop": open_loop | missing,
            "outcomes": outcomes,
            **({"probes": probe(model, held, clips, data.sequence_length, options)} if options.probes else {}),
            "seconds": time.perf_counter() - began,
        }
        out = Path(folder) if folder else info["checkpoint"].parent / "evaluation"
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "evaluation.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        write_clip(model, clips, out / "prediction.png")
        write_prediction(model, episodes[:4], out / "prediction.mp4", device, options.context, options.horizon)
    finally:
        for batches in parts.values():
            batches.close()
    print_tables(result)
    print(f"\nwritten to {out}: evaluation.json, prediction.png, prediction.mp4")
    return result


def evaluate_returns(options: EvaluateConfig, run: str) -> dict:
    """Plays episodes with the actor of an online run, without its noise, or by planning, which needs no actor.

    Writes returns.json, .mp4 and .png, those of planning into a folder `plan`; returns the first.
    """
    from aime_fast.evaluation.returns import play, summarise_returns, write_returns
    from aime_fast.runtime.files import write_text
    from aime_fast.runtime.machine import choose_device, choose_kernels, choose_tf32
    from aime_fast.runtime.provenance import git_commit, version
    from aime_fast.training.policies import load_planning_policy, load_policy

    if not options.ema:
        raise ConfigError("--no-ema: an actor acts by what the averaged weights infer; leave it out")
    device = choose_device(options.device)
    choose_kernels(None)
    plans = options.policy == "plan"
    policy, config, info = load_planning_policy(run, device) if plans else load_policy(run, device)
    choose_tf32(config.run.tf32, config.run.precision)
    data = config.data
    episodes = play(policy, data, options.episodes or 10, options.seed)
    result = {
        "checkpoint": str(info["checkpoint"]), "step": info["step"], "domain": data.domain, "task": data.task,
        "environment_frames": info["environment_frames"], "seed": options.seed, "device": str(device), "torch": version("torch"),
        "commit": git_commit(), "policy": options.policy, **summarise_returns(episodes, data.frame_skip),
    }  # fmt: skip
    out = Path(options.out) if options.out else info["checkpoint"].parent / "evaluation" / ("plan" if plans else "")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "returns.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    write_returns(policy, episodes, out, options.context, options.horizon)
    error = "" if result["standard_error"] is None else f" +- {result['standard_error']:.0f} (standard error)"
    print(
        f"{result['checkpoint']}: {data.domain} {data.task}, {info['environment_frames']} environment frames, return of {len(episodes)} "
        f"episodes of the {'planner' if plans else 'actor'} {result['mean']:.0f}{error}, least {result['minimum']:.0f}"
    )
    print(f"written to {out}: returns.json, returns.mp4, returns.png")
    return result


def check(options: EvaluateConfig) -> None:
    """Raises ConfigError for a number out of range; `cut_clips` checks those of the clips."""
    for name, least in (("episodes", 1), ("samples", 0), ("batch", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: expected at least {least}")
    if options.policy == "plan" and not options.returns:
        raise ConfigError("--policy plan: only --returns plays episodes; pass it too")


def choose_parts(parts: dict[str, SequenceBatches], options: EvaluateConfig, run_split: Split) -> tuple[SequenceBatches, SequenceBatches]:
    """(training episodes, those to evaluate). Raises DataError where other data hold training episodes of the run."""
    from aime_fast.data.split import check_disjoint

    if options.data:
        check_disjoint([identity for part in parts["training"].split for identity in part], run_split, options.data)
    return parts["training"], parts[options.part]


def held_out(data: DataConfig, training: SequenceBatches, evaluated: SequenceBatches, limit: int | None) -> HeldOut:
    """The first `limit` episodes to evaluate, or all."""
    from aime_fast.data import DMCVBDataset
    from aime_fast.evaluation.clips import spread
    from aime_fast.evaluation.positions import make_reader
    from aime_fast.evaluation.readout import MAX_FRAMES

    chosen = range(len(evaluated.episodes))[:limit]
    if data.data == "synthetic":
        return HeldOut([evaluated.episode(i).cpu() for i in chosen], "not measured: synthetic data have no positions", [])
    dataset = DMCVBDataset(data.data, data.sequence_length)
    episodes = [dataset.read_episode(evaluated.episodes[i]) for i in chosen]
    if not dataset.position_names:
        return HeldOut(episodes, f"not measured: {data.data} has no 'positions'; collect the data again with this version", [])
    few = spread(max(1, MAX_FRAMES // max(training.lengths)), len(training.episodes))
    known = [dataset.read_episode(training.episodes[i]) for i in few]
    return HeldOut(episodes, make_reader(dataset, training.episodes, training.device), known)


def probe(model: nn.Module, held: HeldOut, clips: Clips, frames: int, options: EvaluateConfig) -> dict:
    """What each pillar is worth, and what the latent tells about positions; `frames` of a sequence."""
    from aime_fast.evaluation.probes import probe_films, probe_sequences
    from aime_fast.evaluation.readout import probe_latents

    device = model.decoder.background.device
    rows = probe_sequences(model, held.episodes, frames, device, options.batch, options.seed)
    rows |= probe_films(model, clips, device, options.batch)
    if not held.known:
        return {"pillars": rows, "latents": held.reader}
    return {"pillars": rows, "latents": probe_latents(model, held.known, held.episodes, held.reader.names, device)}


def write_clip(model: nn.Module, clips: Clips, path: Path, count: int = 8) -> None:
    """A sheet of the first clip's predicted frames: truth | prediction | error | attention overlay, evenly spaced in the horizon."""
    from aime_fast.data import normalise
    from aime_fast.evaluation.clips import spread
    from aime_fast.evaluation.films import predict
    from aime_fast.evaluation.pictures import write_sheet

    first = clips[:1].to(model.decoder.background.device)
    out = predict(model, first)
    columns = spread(count, first.horizon)
    truth = normalise(first.pixels[0, clips.context :])
    write_sheet(path, truth[columns], out["reconstructions"][0, columns], out["attention"][0, columns])


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and evaluate."""
    evaluate(parse_arguments(EvaluateConfig, "python -m aime_fast.evaluate", "Evaluate a trained run.", argv))


if __name__ == "__main__":
    run_command(main)
