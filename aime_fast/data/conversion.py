"""What `aime_fast.convert` does with each episode that a reader of `foreign` gives: brought to one size, rate and range, and written."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aime_fast.data.episodes import RANGES, UNRECORDED
from aime_fast.data.foreign import Episode
from aime_fast.data.foreign.pictures import square
from aime_fast.data.unfinished import Unfinished
from aime_fast.data.writer import EpisodeWriter
from aime_fast.errors import DataError, Interrupted
from aime_fast.runtime.processes import begin_worker

Then = Callable[[int], None]
ORIGIN = "origin"  # attribute of a finished episode: where in the source it was
AHEAD = 2  # episodes read ahead for each worker
LIMITS = {name: bounds for name, *bounds in RANGES}  # what training accepts
ROUNDING = 1e-6  # so far outside of [-1, 1] an action may lie, and is brought back


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
    joined = recipe.skip if recipe.concatenate and len(recipe.low) > 1 else 1
    return {
        "domain": domain, "task": task, "frame_skip": frame_skip * recipe.skip, "image_size": recipe.image_size, "render_quality": "full",
        "policy": "recorded elsewhere", "position_names": [], "source": str(source.resolve()), "source_format": form,
        "action_low": list(recipe.low) * joined, "action_high": list(recipe.high) * joined, "action_dim": 1,
        "conversion": json.dumps({"format": form, **(reading or {}), **recipe._asdict()}),
    }  # fmt: skip


def action_range(episodes: Iterable[Episode]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(least, largest) of each action over all episodes; a constant action gets the range around it that brings it to 0.

    Raises DataError where one is not a finite number, or episodes have other numbers of actions.
    """
    ranges, first = [], None
    for episode in episodes:
        first = first or episode
        _check_alike(episode, first)
        _check_values(episode.where, "action", episode.action)
        ranges.append((episode.action.min(0), episode.action.max(0)))
    if not ranges:
        return (-1.0,), (1.0,)
    low, high = np.min([low for low, _ in ranges], 0), np.max([high for _, high in ranges], 0)
    constant = np.asarray(low == high, dtype=low.dtype)
    return tuple((low - constant).tolist()), tuple((high + constant).tolist())


def prepare(episode: Episode, recipe: Recipe) -> dict[str, np.ndarray]:
    """The arrays of `aime_fast.data.episodes`. Raises DataError where a value is one that training refuses."""
    low, high = (np.asarray(part, dtype=np.float64) for part in (recipe.low, recipe.high))
    if low.size not in (1, episode.action.shape[1]):
        raise DataError(f"{episode.where}: {episode.action.shape[1]} actions, --action-range has {low.size}")
    in_range = np.all(low == -1) and np.all(high == 1)
    action = episode.action if in_range else (2 * (episode.action - low) / (high - low) - 1).astype(np.float32)
    _check_values(episode.where, "action", action)
    outside = np.abs(action) > 1 + ROUNDING
    if outside.any():
        row, which = np.argwhere(outside)[0]
        least, largest = (part.flat[which % part.size] for part in (low, high))
        raise DataError(
            f"{episode.where}: action {which} of row {row} is {episode.action[row, which]:g}, outside [{least:g}, {largest:g}]; give the "
            "range of the recorded actions with --action-range LOW HIGH, or have it found with --find-action-range"
        )
    frames, action = len(action), action.clip(-1, 1)
    reward = np.zeros(frames, np.float32) if episode.reward is None else episode.reward
    discount = np.ones(frames, np.float32) if episode.discount is None else episode.discount
    for name, values in (("reward", reward), ("discount", discount)):
        _check_values(episode.where, name, values, *LIMITS[name])
    pixels, skip = episode.pixels, recipe.skip
    if skip > 1:
        begins = np.arange(0, frames, skip)
        pixels, reward, discount = pixels[::skip], np.add.reduceat(reward, begins), np.multiply.reduceat(discount, begins)
        action = _concatenated(action, skip) if recipe.concatenate else action[::skip]
    return {
        "pixels": _resized(pixels, recipe.image_size), "action": action, "reward": reward, "discount": discount,
        "is_init": np.arange(len(action)) == 0,
    }  # fmt: skip


def _check_values(where: str, name: str, values: np.ndarray, low: float = -np.inf, high: float = np.inf) -> None:
    """Raises DataError at the first of [T, ...] that is not finite, or out of range."""
    bad = ~np.isfinite(values) | (values < low) | (values > high)
    if bad.any():
        row, *which = at = tuple(int(i) for i in np.argwhere(bad)[0])
        expected = "a finite number" if np.isinf([low, high]).all() else f"a number in [{low:g}, {high:g}]"
        raise DataError(
            f"{where}: {' '.join([name, *map(str, which)])} of row {row} is {values[at]:g}, expected {expected}; mend it there, leave the "
            f"episode out, or choose what is taken with --map {name}=NAME"
        )


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
    episodes: Iterator[Episode], source: Path, out: Path, attributes: Mapping[str, Any], recipe: Recipe, workers: int = 1,
    resume: bool = False, advance: Then = lambda frames: None,
) -> Converted:  # fmt: skip
    """Write episodes into one HDF5 file or a folder of them, in their order. Memory: `AHEAD` episodes a worker.

    It appears under `out` when every episode is written. Until then the finished ones are in the folder `out`.unfinished, and whatever
    ends the process leaves them there. An episode is known again by its file and place in the source.

    Args:
        episodes: of a reader of `source`; all have as many actions, and all or none have rewards.
        out: file to write; without a suffix, a folder of files.
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
    too_short, changed, order = 0, 0.0, []  # order: numbers of the episodes in `unfinished`
    with Unfinished(out, attributes, resume, as_folder=not out.suffix) as unfinished:
        known = {facts[ORIGIN]: number for number, facts in unfinished.facts.items() if ORIGIN in facts}
        unused = itertools.count(max(unfinished.numbers, default=-1) + 1)
        try:
            with _writers(workers, partial(write_episode, attributes, recipe)) as write:
                for episode in itertools.chain([first], episodes):
                    _check_alike(episode, first)
                    if recipe.skip > 1 and not recipe.concatenate:
                        changed = max(changed, _changed(episode.action, recipe.skip))
                    if -(-len(episode.action) // recipe.skip) < recipe.shortest:
                        too_short += 1
                    elif (origin := episode.where.removeprefix(str(source))) in known:
                        order.append(known[origin])
                    else:
                        order.append(number := next(unused))
                        write(unfinished.place(number), origin, episode, partial(_written, unfinished, number, advance))
            if not order:
                raise DataError(f"{attributes['source']}: all {too_short} episodes are shorter than --shortest {recipe.shortest}")
            unfinished.join(order)
        except (DataError, KeyboardInterrupt) as error:
            rest = f"; {len(unfinished.numbers)} episodes are in {unfinished.folder}, go on with --resume" if unfinished.numbers else ""
            if isinstance(error, DataError):
                raise DataError(f"{error}{rest}") from error
            raise Interrupted(getattr(error, "status", 128 + signal.SIGINT) - 128, f"conversion stopped{rest}") from None
    return Converted(too_short, rewards, changed)


def _check_alike(episode: Episode, first: Episode) -> None:
    if (actions := episode.action.shape[1]) != first.action.shape[1]:
        raise DataError(f"{episode.where}: {actions} actions, {first.where} has {first.action.shape[1]}; convert them apart")
    if (episode.reward is None) != (first.reward is None):
        raise DataError(f"{episode.where}: {'lacks' if episode.reward is None else 'has'} rewards, unlike {first.where}")


def write_episode(attributes: Mapping[str, Any], recipe: Recipe, path: Path, origin: str, episode: Episode) -> int:
    """Write an episode as a file of its own, with its place in the source; returns its frames. Called in a worker. Raises DataError."""
    arrays = prepare(episode, recipe)
    with EpisodeWriter(path, {**attributes, ORIGIN: origin}) as writer:
        writer.write(arrays)
    return len(arrays["action"])


def _written(unfinished: Unfinished, number: int, advance: Then, frames: int) -> None:
    unfinished.added(number)
    advance(frames)


@contextmanager
def _writers(workers: int, job: Callable[[Path, str, Episode], int]) -> Iterator[Callable[[Path, str, Episode, Then], None]]:
    """Yields write(path, origin, episode, then), which calls `then` with the frames once it is written, at the latest at the end."""
    if workers == 1:
        yield lambda path, origin, episode, then: then(job(path, origin, episode))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=begin_worker, initargs=(os.getpid(),))
    running: dict[Future[int], Then] = {}

    def collect(most: int) -> None:
        while len(running) > most:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future)(future.result())

    def write(path: Path, origin: str, episode: Episode, then: Then) -> None:
        collect(workers * AHEAD - 1)
        running[pool.submit(job, path, origin, episode)] = then

    try:
        yield write
        collect(0)
    except BrokenProcessPool as error:
        raise DataError("a worker process has ended; the system does that when memory runs out, pass fewer --workers") from error
    except (DataError, KeyboardInterrupt):
        for future in running:
            future.cancel()
        while running:  # what is being written is kept
            with suppress(DataError, BrokenProcessPool, CancelledError):
                collect(0)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
