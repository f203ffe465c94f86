"""Who plays the episodes of a cycle of online training: this process, or a second one while this one learns."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from aime_fast.config import DataConfig
from aime_fast.data.collectors import MakePolicy, play_episodes
from aime_fast.data.growing import GrowingReplay
from aime_fast.errors import DataError
from aime_fast.runtime.processes import begin_worker
from aime_fast.training.policies import make_recording_policy

POLL = 0.2  # seconds between two looks at a signal while this process waits for the other


class Played(NamedTuple):
    """The episodes of a cycle."""

    returns: list[float]
    frames: int  # agent steps
    seconds: float
    rewards_differ: bool  # whether any two rewards are not equal

    def row(self, frame_skip: int) -> dict[str, float]:
        """What is logged of them."""
        return {
            "play/return": sum(self.returns) / len(self.returns), "play/least_return": min(self.returns), "play/seconds": self.seconds,
            "play/environment_frames_per_second": self.frames * frame_skip / self.seconds,
        }  # fmt: skip


def record(
    replay: GrowingReplay, make_policy: MakePolicy, seed: int, count: int, asked_to_stop: Callable[[], None] = lambda: None
) -> Played:
    """Plays `count` episodes and adds them to the replay. `asked_to_stop` is called between them, and may raise."""
    began, returns, frames, rewards = time.perf_counter(), [], 0, set()
    episodes = play_episodes(replay.config, make_policy, seed, replay.next_number)
    try:
        for episode in islice(episodes, count):
            asked_to_stop()
            replay.add(episode)
            returns.append(float(episode["reward"].sum()))
            frames += len(episode["action"])
            rewards |= {float(episode["reward"].min()), float(episode["reward"].max())}
    finally:
        episodes.close()
    return Played(returns, frames, time.perf_counter() - began, len(rewards) > 1)


def _record_beside(
    folder: Path, config: DataConfig, attributes: Mapping[str, Any], number: int, checkpoint: str, seed: int, count: int
) -> Played:
    """`record` in the second process, by the policy of a checkpoint."""
    replay = GrowingReplay(folder, config, attributes, number)
    return record(replay, partial(make_recording_policy, checkpoint), seed, count)


class SecondPlayer:
    """A process that plays the next episodes into a replay. One that dies is started once more in each cycle.

    What it plays depends on the checkpoint, the numbers of the episodes and the seed alone, not on how fast it is.

    Args: replay: into whose folder it writes; seed: of the run.
    """

    def __init__(self, replay: GrowingReplay, seed: int):
        self.replay, self.seed = replay, seed
        self._pool: ProcessPoolExecutor | None = None
        self._task: tuple[Any, ...] | None = None
        self._result: Future | None = None

    @property
    def plays(self) -> bool:
        """Whether episodes were begun and not yet taken."""
        return self._result is not None

    def begin(self, checkpoint: Path, count: int) -> None:
        """Begins to play `count` episodes, numbered from the replay's next one, by the policy of a checkpoint."""
        replay = self.replay
        self._task = (replay.folder, replay.config, replay.attributes, replay.next_number, str(checkpoint), self.seed, count)
        self._submit()

    def finish(self, asked_to_stop: Callable[[], None]) -> Played:
        """Waits for the episodes, which then belong to the replay. Raises DataError if the process dies twice, and its own errors."""
        for last in (False, True):
            try:
                while not self._result.done():
                    asked_to_stop()
                    time.sleep(POLL)
                played = self._result.result()
                self.replay.next_number += len(played.returns)
                self._result = None
                return played
            except BrokenProcessPool as error:
                self.close()
                if last:
                    raise DataError(
                        "the process that plays has ended twice; the system does that when memory runs out: with --no-plays-beside the "
                        "process that learns plays. The run goes on from its last checkpoint with --resume"
                    ) from error
                self._submit()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _submit(self) -> None:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=begin_worker, initargs=(os.getpid(),))
        try:
            self._result = self._pool.submit(_record_beside, *self._task)
        except BrokenProcessPool:  # it died while it waited
            self.close()
            self._submit()
