"""Trains ours for so many processor seconds, or measures what its parts cost.

    python -m profiling.learning.ours train|measure SPEC FOLDER

The trainer is used as a user does: a config, `DMCVBTrainer(config).train()`, a signal to stop, and a resumed run. The joint updates are
stopped by SIGTERM when their share of the budget is spent; then the run is resumed with as many steps as were made, which leaves the
latent phase, and that has as many updates as the rest of the budget allows. What it costs was measured before (`measure`, once for all
seeds). Unpacking the data, making batches and checkpoints count; imports, reading the data a second time for the resumed run, and the
video at the end do not.

SPEC is a JSON file with `config`, `threads` and, to train, the budget `seconds`, `stop`, the second of it at which the joint updates end,
`steps`, at which they end in any case, `most_latent`, updates of the latent phase or null, and `costs`; to measure, `updates` and
`latent_updates`, two numbers.
FOLDER gets `points.json`, a list of {seconds, updates (joint ones), frames, checkpoint}, one for each checkpoint, the last of the end.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aime_fast.config import Config, from_dict
from aime_fast.errors import Interrupted
from aime_fast.training import DMCVBTrainer
from aime_fast.training.checkpoint import list_checkpoints
from aime_fast.training.schedules import PERCEIVES_EVERY
from profiling.learning.clock import Clock
from profiling.machine import write_json

OVERSPENT = 1.05  # of the budget, at which the latent phase is stopped where it is: the machine became slower after its costs were measured
POLL = 0.05  # seconds between looks at the run's folder


class Watch(threading.Thread):
    """Notes at how many processor seconds checkpoints and rows of metrics.jsonl appear in a run's folder, and stops the run in time.

    Attributes:
        points: {seconds, updates, checkpoint} for each checkpoint, a link that a later one of the same step does not replace.
        rows: seconds of each row.
        stop_at: processor seconds at which SIGTERM is sent to this process, once; None: never.
    """

    def __init__(self, run_dir: Path, links: Path, clock: Clock):
        super().__init__(daemon=True)
        self.run_dir, self.links, self.clock = run_dir, links, clock
        self.points: list[dict[str, Any]] = []
        self.rows: list[float] = []
        self.stop_at: float | None = None
        self._seen: dict[Path, int] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(POLL):
            self._look()

    def finish(self) -> None:
        """Look once more, and end."""
        self._over.set()
        self.join()
        self._look()

    def _look(self) -> None:
        now = self.clock.seconds
        if self.stop_at is not None and now >= self.stop_at:
            self.stop_at = None
            os.kill(os.getpid(), signal.SIGTERM)
        metrics = self.run_dir / "metrics.jsonl"
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self.rows += [now] * (rows - len(self.rows))
        for path in list_checkpoints(self.run_dir):
            written = path.stat().st_mtime_ns
            if self._seen.get(path) != written:
                self._seen[path] = written
                link = self.links / f"point_{len(self.points):04d}.pt"
                link.unlink(missing_ok=True)
                os.link(path, link)
                self.points.append({"seconds": now, "updates": int(path.stem.split("_")[1]), "checkpoint": str(link)})


def train(spec: dict, folder: Path) -> None:
    """Train as said above."""
    config, watch = _begin(spec, folder)
    # The trainer heeds the signal while it trains; one that comes later, as it validates, has nothing to stop.
    signal.signal(signal.SIGTERM, lambda *_: None)
    wanted = config.optim.latent_phase_updates
    watch.stop_at = spec["stop"]
    trainer = DMCVBTrainer(_for(config, spec["steps"], latent=0))
    try:
        trainer.train()
    except Interrupted:
        print(f"joint updates stopped at {trainer.step} after {watch.clock.seconds:.0f} s", flush=True)
    watch.stop_at = None
    if wanted:
        costs, pictures = spec["costs"], min(trainer.step, trainer.picture_steps)
        expected = pictures * costs["picture_step"] + (trainer.step - pictures) * costs["update"]
        # The machine may have become faster or slower since costs were measured.
        pace = watch.clock.seconds / expected if expected > 0 else 1.0
        left, each = spec["seconds"] - watch.clock.seconds - pace * costs["latent_begin"], pace * costs["latent_update"]
        if each > 0:
            wanted = max(0, min(int(left / each), math.inf if spec["most_latent"] is None else spec["most_latent"]))
    if wanted:
        with watch.clock.paused():
            trainer = DMCVBTrainer(_for(config, trainer.step, wanted, resume=True))
        watch.stop_at = OVERSPENT * spec["seconds"]
        try:
            trainer.train()
        except Interrupted as stopped:
            print(f"over budget: {stopped}", flush=True)
    watch.finish()
    frames = config.data.batch_size * config.data.sequence_length * config.optim.accumulate
    for point in watch.points:
        pictures = min(point["updates"], trainer.picture_steps)
        joint = point["updates"] - pictures
        sequences, stills = joint + pictures // PERCEIVES_EVERY, pictures + joint if config.data.stills else 0
        point["frames"] = frames * (sequences + stills)
        point["updates"] = joint
    write_json(folder / "points.json", watch.points)


def measure(spec: dict, folder: Path) -> None:
    """Write `costs.json`: processor seconds of a `picture_step` and of a joint `update` (of `updates` each, the first two left out), of the
    beginning of a latent phase (`latent_begin`: the inference of all episodes and the measures on the way) and of one of its updates
    (`latent_update`), from two phases of `latent_updates`."""
    updates, (few, more) = spec["updates"], spec["latent_updates"]
    pictures = updates if spec["config"]["data"]["stills"] else 0
    config, watch = _begin(spec, folder)
    # With all tasks from the first update on: later updates cost more than early ones.
    optim = replace(config.optim, adversarial_start_epochs=0.0, picture_steps=pictures)
    run = replace(config.run, log_every=1, checkpoint_every=0)
    config = replace(config, optim=optim, run=run)
    DMCVBTrainer(_for(config, pictures + updates, latent=0)).train()

    def cost(rows: list[float]) -> float:
        return (rows[updates - 1] - rows[1]) / (updates - 2) if rows else 0.0

    costs = {"picture_step": cost(watch.rows[:pictures]), "update": cost(watch.rows[pictures : pictures + updates])}
    costs |= {"latent_begin": 0.0, "latent_update": 0.0}
    if config.optim.latent_phase_updates != 0:
        spent = []
        for made in (few, more):
            trainer = DMCVBTrainer(_for(config, pictures + updates, made, resume=True))
            began, before = watch.clock.seconds, len(watch.points)
            trainer.train()
            time.sleep(2 * POLL)
            if len(watch.points) == before:
                raise RuntimeError("the latent phase wrote no checkpoint")
            spent.append(watch.points[-1]["seconds"] - began)
        costs["latent_update"] = max(0.0, spent[1] - spent[0]) / (more - few)
        costs["latent_begin"] = max(0.0, spent[0] - few * costs["latent_update"])
    watch.finish()
    write_json(folder / "costs.json", costs)


def _begin(spec: dict, folder: Path) -> tuple[Config, Watch]:
    torch.set_num_threads(spec["threads"])
    folder.mkdir(parents=True, exist_ok=True)
    config = from_dict(spec["config"])
    config = replace(config, run=replace(config.run, run_dir=str(folder / "run"), threads=spec["threads"], device="cpu"))
    watch = Watch(folder / "run", folder, Clock())
    watch.start()
    return config, watch


def _for(config: Config, steps: int, latent: int, resume: bool = False) -> Config:
    """The run with so many joint updates and updates of the latent phase. Nothing is validated or drawn on the way: checkpoints are
    measured afterwards. The latent phase is saved at its end alone."""
    run = replace(
        config.run, steps=steps, epochs=None, resume=resume, validate_every=0, sample_every=0, checkpoint_minutes=0.0,
        checkpoint_every=0 if resume else config.run.checkpoint_every, keep_checkpoints=10000,
    )  # fmt: skip
    return replace(config, optim=replace(config.optim, latent_phase_updates=latent), run=run)


if __name__ == "__main__":
    {"train": train, "measure": measure}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
