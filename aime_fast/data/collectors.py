"""Record episodes: TorchRL collectors step dm_control, and each finished episode is written to HDF5."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from aime_fast.bounds import check
from aime_fast.config import Backend, DataConfig, RunConfig
from aime_fast.data.backends import MakePolicy, WorkerError, check_backend, messages, open_collector
from aime_fast.data.environments import Task, describe_task, make_environment, probe_renderer
from aime_fast.data.files import writable_target
from aime_fast.data.noise import NoisePolicy
from aime_fast.data.unfinished import Unfinished
from aime_fast.errors import DataError, Interrupted, stop_signals
from aime_fast.runtime.progress import episode_bar

if TYPE_CHECKING:
    from torchrl.collectors import BaseCollector

FRAMES_PER_MESSAGE = 256  # of one worker; a message has a fixed cost, its size hardly matters
MOST_IDLE = 1000  # episodes that a worker plays when it has played all of its own
SEEDING = "by number"  # of a recording: how its episodes begin, see `make_environment`
MOST_DIVERGED = 20  # episodes in a row before a collection gives up
RECORDED_PACKAGES = ("dm_control", "mujoco", "torchrl", "tensordict", "torch", "numpy", "h5py")


class Shard(NamedTuple):
    """The episodes that one of `count` recordings of a job array makes; `index` counts from 1."""

    index: int = 1
    count: int = 1

    def of(self, episodes: int) -> range:
        """Numbers of its episodes, of so many in all."""
        return range(self.index - 1, episodes, self.count)


class SeededPolicy(TensorDictModuleBase):
    """A policy whose random numbers begin anew with each episode, at its `policy_seed`: by its method `seed`, or those of torch.

    For a single environment, as each worker has one.
    """

    def __init__(self, policy: TensorDictModuleBase):
        super().__init__()
        self.in_keys, self.out_keys = [*policy.in_keys, "policy_seed"], policy.out_keys
        self.policy, self._seed = policy, getattr(policy, "seed", torch.manual_seed)

    def forward(self, tensordict: TensorDict) -> TensorDict:
        if tensordict["is_init"].item():
            self._seed(tensordict["policy_seed"].item())
        return self.policy(tensordict)


def collect(
    config: DataConfig, seed: int, out: str | Path, progress: bool = True, resume: bool = False, make_policy: MakePolicy | None = None,
    policy_name: str | None = None, shard: Shard = Shard(), backend: Backend = "local",  # noqa: B008
    further: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Record `config.episodes` whole episodes of a dm_control task, or a shard of them, into one HDF5 file.

    Episode n is a function of `seed` and n, and for pixels of the OpenGL driver: it is the same whatever the number of workers and shards
    and the backend, and whether the collection was stopped. The file appears under `out` only when every episode is written. Until then
    the finished episodes are in the folder `out`.unfinished, and whatever ends the process leaves them there.

    An episode whose simulation diverges is counted in the attribute `diverged_episodes` and played anew, from another initial state.

    Args:
        config: task, number of episodes, frame skip, image size, render quality, policy, workers.
        seed: of initial states and actions, within the bounds of `RunConfig.seed`.
        out: file to write; an existing file is replaced at the end.
        progress: show a progress bar.
        resume: begin with the finished episodes of a collection that ended early; otherwise they are deleted.
        make_policy: acts instead of `config.policy`; policy_name: what the attribute `policy` then says.
        shard: which of the episodes to record.
        backend: where the workers run, see `open_collector`.
        further: attributes of the file besides those of the recording.
    Returns:
        `out` as a Path.
    Raises:
        ConfigError, DataError: a setting is out of range, the task is unknown, no renderer works, a worker has ended, every simulation
            diverges, or the file cannot be written.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after clean-up; the message says where the finished episodes are.
    """
    check(config)
    check(RunConfig(seed=seed))
    check_backend(backend)
    out = Path(out)
    target = writable_target(out)
    renderer = probe_renderer()
    task = describe_task(config)
    attributes = recording_attributes(config, seed, task, renderer, policy_name) | dict(further or {})
    make_policy = make_policy or partial(NoisePolicy, config.policy, task.action_dim)
    frames, wanted = min(FRAMES_PER_MESSAGE, task.longest), shard.of(config.episodes)
    if not wanted:
        raise DataError(f"--shard {shard.index}/{shard.count}: of --episodes {config.episodes} none are left for it; give fewer shards")
    if shard.count > 1:
        attributes["shard"] = f"{shard.index}/{shard.count}"
    with _DeferredInterrupts() as interrupts, Unfinished(target, attributes, resume) as unfinished:
        try:
            if surplus := [number for number in unfinished.numbers if number >= config.episodes]:
                raise DataError(
                    f"--episodes {config.episodes}: {len(surplus)} finished episodes in {unfinished.folder} are beyond them; pass "
                    f"--episodes {max(surplus) + 1} or more, or --overwrite to drop all"
                )
            if missing := [number for number in wanted if number not in unfinished.numbers]:
                _play(config, seed, missing, make_policy, backend, frames, unfinished, interrupts, progress)
            unfinished.join(wanted)
        except (KeyboardInterrupt, DataError, WorkerError) as error:
            done = f"{len(unfinished.numbers)} of {len(wanted)} episodes"
            rest = f"they are in {unfinished.folder}, continue with --resume" if unfinished.numbers else "begin again"
            if isinstance(error, KeyboardInterrupt) or interrupts.received:  # the signal may have ended the workers too
                raise Interrupted(interrupts.received or signal.SIGINT, f"collection stopped after {done}; {rest}") from None
            raise DataError(f"{error} ({done} were recorded: {rest})") from error
    return out


def recording_attributes(config: DataConfig, seed: int, task: Task, backend: str, policy_name: str | None = None) -> dict[str, Any]:
    """The attributes of a file of episodes; `policy_name`, where it was not `config.policy` that acted."""
    settings = ("domain", "task", "frame_skip", "image_size", "camera", "render_quality", "policy", "workers")
    return {key: getattr(config, key) for key in settings} | {
        **({"policy": policy_name} if policy_name else {}),
        "action_dim": task.action_dim,
        "action_low": list(task.action_low),
        "action_high": list(task.action_high),
        "seeding": SEEDING,
        "position_names": task.position_names,
        "seed": seed,
        "render_backend": backend,
        "versions": json.dumps({name: version(name) for name in RECORDED_PACKAGES}),
    }


def play_episodes(config: DataConfig, make_policy: MakePolicy, seed: int, begin: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Endless whole episodes, as arrays of `episodes.py`, played in this process; one that diverges is played anew.

    `begin` is the number of the first one: see `make_environment`. Close the iterator when done. Raises DataError if the simulation
    diverges again and again.
    """
    longest = describe_task(config).longest
    diverged = 0
    environments = [partial(make_environment, config, seed, itertools.count(begin))]
    with open_collector("local", environments, partial(_seeded, make_policy), min(FRAMES_PER_MESSAGE, longest)) as collector:
        for _, episode in _whole_episodes(collector):
            diverged = 0 if episode is not None else diverged + 1
            if diverged == MOST_DIVERGED:
                raise DataError(f"--task {config.task}: the simulation diverged in {diverged} episodes in a row; choose another --task")
            if episode is not None:
                yield episode


def _play(
    config: DataConfig, seed: int, missing: list[int], make_policy: MakePolicy, backend: Backend, frames: int, unfinished: Unfinished,
    interrupts: _DeferredInterrupts, progress: bool,
) -> None:  # fmt: skip
    """Play until `unfinished` has the missing episodes. Raises KeyboardInterrupt after a signal, DataError, WorkerError."""
    diverged = in_a_row = idle = 0
    workers, left = min(config.workers, len(missing)), set(missing)
    environments = [partial(make_environment, config, seed, missing[worker::workers]) for worker in range(workers)]
    playing = open_collector(backend, environments, partial(_seeded, make_policy), frames)
    with playing as collector, episode_bar("collecting", progress, len(missing)) as advance:
        began = time.perf_counter()  # the workers are up
        for number, episode in _whole_episodes(collector):
            if interrupts.received:
                raise KeyboardInterrupt
            if number not in left:  # of a worker that has played all of its own
                idle += number < 0
                if idle > MOST_IDLE * workers:
                    raise DataError(f"episodes {sorted(left)[:3]} were not played; this is a fault of the program")
                continue
            if episode is None:
                in_a_row += 1
                if in_a_row == MOST_DIVERGED:
                    raise DataError(
                        f"--task {config.task}: the simulation diverged in {in_a_row} episodes in a row; choose another --policy or --task"
                    )
                continue
            now = time.perf_counter()
            unfinished.add(number, episode, now - began, in_a_row)
            left.remove(number)
            began, diverged, in_a_row = now, diverged + in_a_row, 0
            advance(len(episode["action"]))
            if not left:
                break
    if diverged:
        print(f"the simulation diverged in {diverged} episodes; they were played anew, from other initial states", file=sys.stderr)


def _whole_episodes(collector: BaseCollector) -> Iterator[tuple[int, dict[str, np.ndarray] | None]]:
    """Whole episodes of all workers by number, ordered by message, then by worker; None for one whose simulation diverged."""
    pending: list[list[TensorDict]] = []
    for message in messages(collector):
        streams = message if message.ndim == 2 else message.unsqueeze(0)  # [workers, frames]
        pending = pending or [[] for _ in streams]
        for parts, stream in zip(pending, streams.unbind(0)):
            begin = 0
            for end in (stream["next", "done"].squeeze(-1).nonzero().flatten() + 1).tolist():
                parts.append(stream[begin:end])
                number = stream["number"][end - 1].item()
                yield number, None if stream["next", "diverged"][end - 1].item() else _to_arrays(parts)
                parts.clear()
                begin = end
            if begin < len(stream):
                parts.append(stream[begin:].clone())  # the collector writes its next message into the same memory


def _to_arrays(parts: list[TensorDict]) -> dict[str, np.ndarray]:
    """Consecutive pieces of one episode as the arrays of `episodes.py`: reward and discount share the row of their action."""
    keys = {
        "pixels": "pixels",
        "action": "action",
        "reward": ("next", "reward"),
        "discount": ("next", "discount"),
        "is_init": "is_init",
        "positions": "positions",
    }
    episode = {name: torch.cat([part[key] for part in parts]).numpy() for name, key in keys.items()}
    return {name: value[:, 0] if name in ("reward", "discount", "is_init") else value for name, value in episode.items()}


def _seeded(make_policy: MakePolicy) -> SeededPolicy:
    return SeededPolicy(make_policy())


class _DeferredInterrupts:
    """While entered, the first SIGINT, SIGTERM or SIGHUP is put into `received`, and a second raises KeyboardInterrupt.

    Python discards an exception that a signal handler raises during a weak reference's callback, and TensorDict runs many of those.
    Signals that the process was started to ignore are ignored further.
    """

    def __init__(self):
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _DeferredInterrupts:
        self._previous = {number: signal.signal(number, self._handle) for number in stop_signals()}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
