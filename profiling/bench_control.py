"""Compare what two agents learn to do in the same processor time: ours and DreamerV3 of TorchRL, on the same task, pixels and machine.

For each seed the two train in processes that take turns (SIGSTOP, SIGCONT), until each has played --environment-frames or spent the budget
in processor seconds. Ours is `aime_fast.train --online`, judged by its last whole cycle. The peer begins with the same noise episodes, then
plays an episode, makes the updates that its `train_ratio` asks for, and so on. Both then play episodes without noise in their actions. The
folder gets control.json (everything, by seed), control.md (one table) and curves.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from aime_fast.cli import parse_config
from aime_fast.config import PRESETS, Config, from_dict, to_dict
from aime_fast.errors import Interrupted, UserError
from aime_fast.runtime.machine import keep_freed_memory
from aime_fast.runtime.provenance import version
from profiling.learning.output import mean_and_range, table
from profiling.learning.turns import environment, processor_seconds, python, take_turns
from profiling.machine import describe, title, write_json
from profiling.peers.dreamer_v3_agent import DreamerV3Agent, DreamerV3AgentConfig, DreamerV3Policy, EpisodeReplay

PEER = "dreamer_v3"
TURN = 60.0  # processor seconds of a turn


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench control`."""
    parser.add_argument("--budget", type=float, required=True, metavar="M", help="processor minutes of training for each agent and seed")
    parser.add_argument("--domain", default="cartpole", help="of dm_control; default cartpole")
    parser.add_argument("--task", default="swingup", help="default swingup")
    parser.add_argument("--environment-frames", type=int, default=100_000, metavar="N", help="simulator steps, at most; default 100000")
    parser.add_argument("--episodes", type=int, default=10, metavar="N", help="episodes without noise at the end; default 10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each agent a seed; default 0")
    parser.add_argument("--only", choices=("ours", "peer"), help="train and score one of the two")
    parser.add_argument("--tier", choices=tuple(PRESETS), default="1", help="of ours; its frame skip and image size are also the peer's")
    parser.add_argument("--ours", default="", metavar="FLAGS", help="of aime_fast.train, in quotes; those of episodes are also the peer's")
    parser.add_argument("--peer-config", default="{}", metavar="JSON", help="fields of the peer's config that differ from its defaults")
    parser.add_argument("--threads", type=int, default=1, metavar="T", help="threads of each; default 1")
    parser.add_argument("--out", default="runs/bench-control", metavar="FOLDER", help="default runs/bench-control")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Train, score, print and write; returns the exit status."""
    out = Path(options.out)
    if sys.platform != "linux":
        usage_error("control: processes take turns by what /proc says of them; run it on Linux")
    for name in ("budget", "threads", "episodes"):
        if not getattr(options, name) > 0:
            usage_error(f"--{name} {getattr(options, name):g}: expected more than 0")
    if any(out.glob("seed*")):
        usage_error(f"--out {out}: results of an earlier bench are there; name another folder, or remove it")
    try:
        sizes = DreamerV3AgentConfig(**json.loads(options.peer_config))
    except (TypeError, ValueError) as error:
        usage_error(f"--peer-config {options.peer_config}: {error}")
    torch.set_num_threads(options.threads)
    flags = f"--tier {options.tier} --online --device cpu --threads {options.threads} --domain {options.domain} --task {options.task}"
    flags += f" --environment-frames {options.environment_frames} {options.ours}"
    config = parse_config("python -m aime_fast.train", "The flags of --ours.", shlex.split(flags))
    head = describe("cpu") | {"budget": options.budget, "threads": options.threads, "config": to_dict(config), "peer": asdict(sizes)}
    head["versions"] |= {name: version(name) for name in ("torchrl", "tensordict", "dm_control", "mujoco")}
    print(f"{title(torch.device('cpu'))}, torch {torch.__version__}, torchrl {version('torchrl')}, commit {head['git_commit']}", flush=True)
    results = []
    try:
        for seed in options.seeds:
            results.append(one_seed(replace(config, run=replace(config.run, seed=seed)), sizes, options, out / f"seed{seed}"))
            write(out, head, results)
    except (UserError, RuntimeError) as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    print((out / "control.md").read_text())
    return 0


def one_seed(config: Config, sizes: DreamerV3AgentConfig, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and score both agents with one seed: {seed, contestants: {name: {score, cost, curve}}}."""
    spec = {"config": to_dict(config), "peer": asdict(sizes), "seconds": 60 * options.budget, "episodes": options.episodes}
    write_json(folder / "spec.json", spec)
    names = {"ours": ["ours"], "peer": [PEER], None: ["ours", PEER]}[options.only]
    commands = {name: python("profiling.bench_control", name, str(folder / "spec.json"), str(folder / name)) for name in names}
    take_turns(commands, folder, TURN, environment(options.threads))
    found = {name: json.loads((folder / name / "result.json").read_text()) for name in names}
    print(f"seed {config.run.seed}: " + ", ".join(f"{name} {one['score']['mean']:.0f}" for name, one in found.items()), flush=True)
    return {"seed": config.run.seed, "contestants": found}


def run(name: str, spec: Mapping[str, Any], folder: Path) -> None:
    """Train and score one agent in this process; writes result.json."""
    from aime_fast.evaluation.returns import play, summarise_returns

    config = from_dict(spec["config"])
    torch.set_num_threads(config.run.threads)
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    train = train_ours if name == "ours" else partial(train_peer, DreamerV3AgentConfig(**spec["peer"]))
    policy, found = train(config, spec["seconds"], folder)
    found["cost"]["parameters"] = sum(parameter.numel() for parameter in policy.parameters())
    score = summarise_returns(play(policy, config.data, spec["episodes"], config.run.seed), config.data.frame_skip)
    write_json(folder / "result.json", {"score": score} | found)


def _clock() -> Callable[[], float]:
    """Tells the processor seconds of this process and of its children since it was made."""
    began = processor_seconds(os.getpid())
    return lambda: processor_seconds(os.getpid()) - began


def train_peer(sizes: DreamerV3AgentConfig, config: Config, seconds: float, folder: Path) -> tuple[DreamerV3Policy, dict[str, Any]]:
    """(policy without noise, {cost, curve}). A point of the curve is an episode: when it began, the frames up to its end."""
    from aime_fast.data.environments import describe_task, probe_renderer

    clock, _ = _clock(), probe_renderer()  # which is paid by ours too
    data, control, seed = config.data, config.control, config.run.seed
    action_dim = describe_task(data).action_dim
    agent, replay = DreamerV3Agent(data.image_size, action_dim, seed, sizes), EpisodeReplay(seed)
    torch.manual_seed(seed)
    curve, frames, spent, each = [], 0, 0.0, sizes.batch_size * sizes.sequence_length
    with closing(_episodes(config, action_dim, agent.policy())) as episodes:
        for episode in episodes:
            replay.add(episode)
            frames += len(episode["action"])
            played = frames * data.frame_skip
            curve.append(point := {"seconds": spent, "environment_frames": played, "return": float(episode["reward"].sum())})
            if len(curve) == control.seed_episodes:
                agent.give_mean_frame(replay.mean_frame())
            while len(curve) >= control.seed_episodes and agent.updates * each < sizes.train_ratio * frames and clock() < seconds:
                found = agent.update(replay.draw(sizes.batch_size, sizes.sequence_length))
                point["losses"] = {name: value.item() for name, value in found.items()}
                if wrong := [name for name, value in point["losses"].items() if not math.isfinite(value)]:
                    raise RuntimeError(f"{PEER}, update {agent.updates}: {', '.join(wrong)}: not finite")
            spent = clock()
            print(json.dumps(point | {"updates": agent.updates}), flush=True)
            if spent >= seconds or played >= control.environment_frames:
                break
    torch.save({"config": asdict(sizes), "weights": agent.state_dict()}, folder / "agent.pt")
    cost = {"seconds": spent, "environment_frames": played, "updates": agent.updates}
    return agent.policy(sample=False), {"cost": cost, "curve": curve}


def _episodes(config: Config, action_dim: int, policy: DreamerV3Policy) -> Iterator[dict[str, Any]]:
    """Endless episodes: those of noise that ours begins with too, then those of a policy. Each sets torch's random numbers."""
    from aime_fast.data.collectors import play_episodes
    from aime_fast.data.noise import NoisePolicy

    data, seeds = config.data, config.control.seed_episodes
    for make, begin, count in ((partial(NoisePolicy, data.policy, action_dim), 0, seeds), (lambda: policy, seeds, None)):
        with closing(play_episodes(data, make, config.run.seed, begin)) as episodes:
            yield from islice(episodes, count)


def train_ours(config: Config, seconds: float, folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(policy without noise, {cost, curve}). A point of the curve is a cycle: when it began, the frames up to the end of its play."""
    from aime_fast.training import OnlineTrainer
    from aime_fast.training.metrics import read_rows
    from aime_fast.training.policies import load_policy

    folder, clock, over, spent = folder / "run", _clock(), threading.Event(), []

    def watch() -> None:
        # Notes at how many processor seconds rows of metrics appear, and stops the run in time.
        metrics, stop_at = folder / "metrics.jsonl", seconds
        while not over.wait(0.1):
            rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            spent.extend([clock()] * (rows - len(spent)))
            if clock() >= stop_at:
                stop_at = math.inf
                os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: None)  # where the trainer does not heed it, there is nothing to stop
    (watching := threading.Thread(target=watch, daemon=True)).start()
    with suppress(Interrupted):
        OnlineTrainer(replace(config, run=replace(config.run, run_dir=str(folder)))).train()
    over.set()
    watching.join()
    spent.append(clock())  # of a last row that was not seen yet
    rows, began = read_rows(folder), [0.0, *spent]
    if not rows:
        raise RuntimeError(f"ours: no cycle ends within {seconds:.0f} processor seconds; give a longer --budget or fewer --seed-episodes")
    curve = [{"seconds": at, "environment_frames": row["environment_frames"], "return": row["play/return"]} for at, row in zip(began, rows)]
    cost = {"seconds": spent[len(rows) - 1], "environment_frames": rows[-1]["environment_frames"], "updates": rows[-1]["step"]}
    return load_policy(folder)[0], {"cost": cost, "curve": curve}


def write(out: Path, head: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write the files of all seeds so far. head: machine, versions, commit, config, budget, threads; results: of `one_seed`."""
    found: dict[str, dict[str, Any]] = {}
    for name in results[0]["contestants"]:
        each = [_values(result["contestants"][name]) for result in results]
        for label in each[0]:
            found.setdefault(label, {})[name] = mean_and_range([values[label] for values in each])
    write_json(out / "control.json", {**head, "table": found, "seeds": list(results)})
    data, versions, seeds = head["config"]["data"], head["versions"], " ".join(str(result["seed"]) for result in results)
    line = (
        f"{data['domain']} {data['task']}, frame skip {data['frame_skip']}, {data['image_size']} pixels; {head['budget']:g} processor "
        f"minutes for each agent and seed, seeds {seeds}; CPU, {head['threads']} threads, {head['machine']['processor']}; "
        f"torch {versions['torch']}, torchrl {versions['torchrl']}; commit {head['git_commit']}. Mean and, of several seeds, the range."
    )
    (out / "control.md").write_text(table(found, [line]))
    write_curves(out / "curves.png", results, f"{data['domain']} {data['task']}")


def _values(contestant: Mapping[str, Any]) -> dict[str, float | None]:
    """Rows of the table by label."""
    score, cost = contestant["score"], contestant["cost"]
    late = [point["return"] for point in contestant["curve"] if point["environment_frames"] > 0.9 * cost["environment_frames"]]
    return {
        f"return without noise, mean of {score['episodes']} episodes": score["mean"], "its standard error": score["standard_error"],
        "least of these returns": score["minimum"], "return in training, last tenth of the frames": sum(late) / len(late),
        "environment frames, thousands": cost["environment_frames"] / 1e3, "processor minutes": cost["seconds"] / 60,
        "updates of the world model": cost["updates"], "parameters of world model and actor, millions": cost["parameters"] / 1e6,
    }  # fmt: skip


def write_curves(path: Path, results: Sequence[Mapping[str, Any]], task: str) -> None:
    """PNG: returns of training over environment frames and over processor minutes, a line a seed; a star is the mean without noise."""
    from matplotlib.figure import Figure

    axes = (figure := Figure((11, 4), layout="constrained")).subplots(1, 2, sharey=True)
    for axis, cost, label, unit in zip(axes, ("environment_frames", "seconds"), ("thousand frames", "processor minutes"), (1e3, 60)):
        for result in results:
            for number, (who, found) in enumerate(result["contestants"].items()):
                x, y = zip(*((point[cost] / unit, point["return"]) for point in found["curve"]))
                axis.plot(x, y, marker=".", color=f"C{number}", label=who if result is results[0] else None)
                axis.plot(found["cost"][cost] / unit, found["score"]["mean"], marker="*", color=f"C{number}", markersize=12)
        axis.grid(alpha=0.3)
        axis.set_xlabel(label)
    axes[0].set_ylabel(f"return of an episode of {task}")
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
