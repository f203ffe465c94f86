"""Trains the peer for so many processor seconds: `python -m profiling.learning.peer SPEC FOLDER`.

SPEC is a JSON file with `config` (of our own run: its data, split and seed), `peer` (fields of `DreamerV3Config`), `seconds`, `threads` and
`points`. Unpacking the data and making batches count; imports and the writing of checkpoints do not. FOLDER gets `points.json`, a list of
{seconds, updates, frames, checkpoint}, with about `points` entries, the last of the end.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from aime_fast.config import from_dict
from aime_fast.data import make_batches
from aime_fast.runtime.machine import keep_freed_memory
from profiling.learning.clock import Clock
from profiling.machine import write_json
from profiling.peers.dreamer_v3 import DreamerV3, DreamerV3Config


def train(spec: dict, folder: Path) -> None:
    """Train, and write the checkpoints and `points.json`."""
    config, sizes, budget = from_dict(spec["config"]), DreamerV3Config(**spec["peer"]), spec["seconds"]
    torch.set_num_threads(spec["threads"])
    keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    clock, points = Clock(), []
    data = dataclasses.replace(config.data, batch_size=sizes.batch_size, sequence_length=sizes.sequence_length)
    (training,) = make_batches(data, config.run.seed, "cpu", parts=("training",))
    try:
        peer = DreamerV3(training.image_size, training.action_dim, config.run.seed, sizes)
        peer.give_mean_frame(training.mean_frame())
        torch.manual_seed(config.run.seed)  # of the samples in training
        seconds = clock.seconds
        while seconds < budget:
            peer.update(next(training), seconds / budget)
            seconds = clock.seconds
            if seconds >= budget or seconds >= budget * (len(points) + 1) / spec["points"]:
                with clock.paused():
                    path = folder / f"checkpoint_{peer.updates:08d}.pt"
                    torch.save({"config": dataclasses.asdict(sizes), **peer.state()}, path)
                    frames = peer.updates * sizes.batch_size * sizes.sequence_length
                    points.append({"seconds": seconds, "updates": peer.updates, "frames": frames, "checkpoint": str(path)})
                    write_json(folder / "points.json", points)
                    print(f"{seconds:.0f} s, update {peer.updates}, {frames / seconds:.0f} frames/s", flush=True)
    finally:
        training.close()


def load(path: str | Path) -> DreamerV3:
    """The peer of a checkpoint, ready to predict."""
    state = torch.load(path, weights_only=True)
    return DreamerV3.from_state(state, DreamerV3Config(**state["config"]))


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
