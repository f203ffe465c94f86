"""What `aime_fast.convert` does with each episode that a reader of `foreign` gives: brought to one size, rate and range, and written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aime_fast.data.episodes import UNRECORDED
from aime_fast.data.foreign import Episode
from aime_fast.data.foreign.pictures import square
from aime_fast.data.unfinished import Unfinished
from aime_fast.data.writer import EpisodeWriter
from aime_fast.errors import DataError, Interrupted
from aime_fast.runtime.processes import begin_worker

AHEAD = 2  # episodes read ahead for each worker


class Recipe(NamedTuple):
    """What each episode is brought to."""

    image_size: int  # H = W
    low: tuple[float, ...] = (-1.0,)  # of recorded actions, one for all or one for each; brought to -1
    high: tuple[float, ...] = (1.0,)  # brought to 1
    skip: int = 1  # rows of the source for one
    concatenate: bool = False  # the actions of these rows become one action of `skip` times as many; else the first stands for all
    shortest: int = 1  # episodes of fewer frames are left out


class Converted(NamedTuple):
    """What came of a conversion."""

    too_short: int  # episodes left out
    rewards: bool  # whether they were recorded
    changed: float  # largest difference between the actions that one stands for


def file_attributes(
    source: Path, form: str, recipe: Recipe, domain: str, task: str, frame_skip: int = 1, reading: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Of a file that `convert` writes, but for its number of actions.

    Args: frame_skip: simulator steps for one row of the source; reading: settings of the reader.
    """
    return {
        "domain": domain, "task": task, "frame_skip": frame_skip * recipe.skip, "image_size": recipe.image_size, "render_quality": "full",
        "policy": "recorded elsewhere", "position_names": [], "source": str(source), "source_format": form,
        "action_low": list(recipe.low), "action_high": list(recipe.high), "action_dim": 1,
        "conversion": json.dumps({"format": form, **(reading or {}), **recipe._asdict()}),
    }  # fmt: skip


def action_range(episodes: Iterable[Episode]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(least, largest) of each action over all episodes; a constant action gets the range around it that brings it to 0."""
    ranges = [(episode.action.min(0), episode.action.max(0)) for episode in episodes]
    low, high = np.min([low for low, _ in ranges], 0), np.max([high for _, high in ranges], 0)
    constant = np.asarray(low == high, dtype=low.dtype)
    return tuple((low - constant).tolist()), tuple((high + constant).tolist())


def prepare(episode: Episode, recipe: Recipe) -> dict[str, np.ndarray]:
    """The arrays of `aime_fast.data.episodes`. Raises DataError where an action lies outside the range."""
    low, high = (np.asarray(part, dtype=np.float64) for part in (recipe.low, recipe.high))
    if low.size not in (1, episode.action.shape[1]):
        raise DataError(f"{episode.where}: {episode.action.shape[1]} actions, --action-range has {low.size}")
    in_range = np.all(low == -1) and np.all(high == 1)
    action = episode.action if in_range else (2 * (episode.action - low) / (high - low) - 1).astype(np.float32)
    outside = ~(np.isfinite(action) & (np.abs(action) <= 1))
    if outside.any():
        row, which = np.argwhere(outside)[0]
        least, largest = (part.flat[which % part.size] for part in (low, high))
        raise DataError(
            f"{episode.where}: action {which} of row {row} is {episode.action[row, which]:g}, outside [{least:g}, {largest:g}]; give the "
            "range of the recorded actions with --action-range LOW HIGH, or have it found with --find-action-range"
        )
    frames = len(action)
    reward = np.zeros(frames, np.float32) if episode.reward is None else episode.reward
    discount = np.ones(frames, np.float32) if episode.discount is None else episode.discount
    pixels, skip = episode.pixels, recipe.skip
    if skip > 1:
        begins = np.arange(0, frames, skip)
        pixels, reward, discount = pixels[::skip], np.add.reduceat(reward, begins), np.multiply.reduceat(discount, begins)
        action = _concatenated(action, skip) if recipe.concatenate else action[::skip]
    return {
        "pixels": _resized(pixels, recipe.image_size), "action": action, "reward": reward, "discount": discount,
        "is_init": np.arange(len(action)) == 0,
    }  # fmt: skip


def _concatenated(action: np.ndarray, skip: int) -> np.ndarray:
    """[T, A] -> [ceil(T / skip), skip A]; the last action of an episode fills the rows that it lacks."""
    lacking = -len(action) % skip
    return np.concatenate([action, np.repeat(action[-1:], lacking, 0)]).reshape(-1, skip * action.shape[1])


def _changed(action: np.ndarray, skip: int) -> float:
    """Largest difference between an action and the first of its `skip` rows."""
    return float(np.abs(action - action[np.arange(len(action)) // skip * skip]).max())


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, h, w, 3] -> [T, size, size, 3], see `square`."""
    if pixels.shape[1:3] == (size, size):
        return np.ascontiguousarray(pixels)
    return np.stack([square(frame, size) for frame in pixels])


def convert(
    episodes: Iterator[Episode], out: Path, attributes: Mapping[str, Any], recipe: Recipe, workers: int = 1, resume: bool = False,
    advance: Callable[[int], None] = lambda frames: None,
) -> Converted:  # fmt: skip
    """Write episodes into one HDF5 file, in their order. Memory: `AHEAD` episodes a worker.

    The file appears under `out` when every episode is written. Until then the finished ones are in the folder `out`.unfinished, and
    whatever ends the process leaves them there.

    Args:
        episodes: of a reader; all have as many actions, and all or none have rewards.
        out: file to write.
        attributes: as of `file_attributes`; `action_dim` is corrected to that of the actions as written.
        recipe: what they are brought to.
        workers: processes that resize, compress and write; 1: this one does it.
        resume: keep the episodes of a conversion that ended early, of the same attributes.
        advance: called with the frames of each written episode.
    Raises:
        DataError: an episode does not fit, a worker has ended, or the file cannot be written. The message says where the others are.
    """
    first = next(episodes, None)
    if first is None:
        raise DataError(f"{attributes['source']}: no episode is in it")
    actions, rewards = first.action.shape[1], first.reward is not None
    attributes = {**attributes, "action_dim": actions * (recipe.skip if recipe.concatenate else 1)}
    attributes |= {} if rewards else {"rewards": UNRECORDED}
    too_short, changed = 0, 0.0
    with Unfinished(out, attributes, resume) as unfinished:
        try:
            with _writers(workers, partial(write_episode, attributes, recipe)) as write:
                for number, episode in enumerate(_chained(first, episodes)):
                    _check_alike(episode, first)
                    if recipe.skip > 1 and not recipe.concatenate:
                        changed = max(changed, _changed(episode.action, recipe.skip))
                    if -(-len(episode.action) // recipe.skip) < recipe.shortest:
                        too_short += 1
                    elif number not in unfinished.numbers:
                        write(unfinished.place(number), episode, partial(_written, unfinished, number, advance))
            if not unfinished.numbers:
                raise DataError(f"{attributes['source']}: all {too_short} episodes are shorter than --shortest {recipe.shortest}")
            unfinished.join(sorted(unfinished.numbers))
        except (DataError, KeyboardInterrupt) as error:
            rest = f"; {len(unfinished.numbers)} episodes are in {unfinished.folder}, go on with --resume" if unfinished.numbers else ""
            if isinstance(error, DataError):
                raise DataError(f"{error}{rest}") from error
            raise Interrupted(getattr(error, "status", 128 + signal.SIGINT) - 128, f"conversion stopped{rest}") from None
    return Converted(too_short, rewards, changed)


def _chained(first: Episode, others: Iterator[Episode]) -> Iterator[Episode]:
    yield first
    yield from others


def _check_alike(episode: Episode, first: Episode) -> None:
    if (actions := episode.action.shape[1]) != first.action.shape[1]:
        raise DataError(f"{episode.where}: {actions} actions, {first.where} has {first.action.shape[1]}; convert them apart")
    if (episode.reward is None) != (first.reward is None):
        raise DataError(f"{episode.where}: {'lacks' if episode.reward is None else 'has'} rewards, unlike {first.where}")


def write_episode(attributes: Mapping[str, Any], recipe: Recipe, path: Path, episode: Episode) -> int:
    """Write an episode as a file of its own; returns its frames. Called in a worker. Raises DataError."""
    arrays = prepare(episode, recipe)
    with EpisodeWriter(path, attributes) as writer:
        writer.write(arrays)
    return len(arrays["action"])


def _written(unfinished: Unfinished, number: int, advance: Callable[[int], None], frames: int) -> None:
    unfinished.added(number)
    advance(frames)


@contextmanager
def _writers(workers: int, job: Callable[[Path, Episode], int]) -> Iterator[Callable[[Path, Episode, Callable[[int], None]], None]]:
    """Yields write(path, episode, then), which calls `then` with the frames once the episode is written, at the latest at the end."""
    if workers == 1:
        yield lambda path, episode, then: then(job(path, episode))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=begin_worker, initargs=(os.getpid(),))
    running: dict[Future[int], Callable[[int], None]] = {}

    def collect(most: int) -> None:
        while len(running) > most:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future)(future.result())

    def write(path: Path, episode: Episode, then: Callable[[int], None]) -> None:
        collect(workers * AHEAD - 1)
        running[pool.submit(job, path, episode)] = then

    try:
        yield write
        collect(0)
    except DataError:
        while running:  # what is whole is kept
            with suppress(DataError):
                collect(0)
        raise
    except BrokenProcessPool as error:
        raise DataError("a worker process has ended; the system does that when memory runs out, pass fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
