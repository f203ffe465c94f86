"""The finished episodes of a recording that is not complete: a folder beside its file or folder, one shard an episode."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aime_fast.data.episodes import OMITTED, SHARED, check_shard, open_shard, read_attributes, read_episode
from aime_fast.data.writer import EpisodeWriter
from aime_fast.errors import DataError, explain

SUFFIX = ".unfinished"
# Attributes that all episodes of a file share.
SAME = (*SHARED, "seed", "policy", "shard", "seeding", "render_backend", "position_names", "source", "conversion")
EPISODES_A_FILE = 100  # where a folder of files is written
WHOLE = "whole"  # that folder until it is complete
ADDED_UP = ("collection_seconds", "diverged_episodes")  # attributes of an episode whose sum is the file's
REMEDIES = {  # for those that no flag sets
    "seeding": "the version of aime_fast that recorded them", "render_backend": "the same renderer (MUJOCO_GL)",
    "action_dim": "the same --domain and --task", "position_names": "the same --domain and --task", "source": "the same SOURCE",
    "conversion": "the same flags",
}  # fmt: skip


def unfinished_folder(out: Path) -> Path:
    """Where the finished episodes of `out` lie until it is complete."""
    return out.with_name(out.name + SUFFIX)


class Unfinished:
    """Keeps each finished episode on the disk at once, whatever ends the process, and joins them to one file at the end.

    Use it as a context manager: it locks the folder, and removes it if it is empty at the end.

    Args:
        out: the file to make, or the folder of files of `EPISODES_A_FILE` each.
        attributes: of the file, as for `EpisodeWriter`.
        resume: keep the episodes of a collection that ended early; otherwise they are deleted.
        as_folder: `out` is a folder, which does not exist yet.
    Attributes:
        numbers: of the finished episodes. facts: attributes of those that an earlier process left, by number.
    Raises:
        DataError: another process records to the same file, the episodes there have other settings, or the folder cannot be written.
    """

    def __init__(self, out: Path, attributes: Mapping[str, Any], resume: bool, as_folder: bool = False):
        self.out, self.folder, self.attributes = out, unfinished_folder(out), OMITTED | dict(attributes)
        self._as_folder = as_folder
        self._shards: dict[int, Path] = {}
        self.facts: dict[int, Mapping[str, Any]] = {}
        self._lock = self._locked()
        try:
            self._read_finished() if resume else self._delete_finished()
        except BaseException:
            os.close(self._lock)
            raise

    @property
    def numbers(self) -> Collection[int]:
        return self._shards.keys()

    def add(self, number: int, episode: Mapping[str, np.ndarray], seconds: float, diverged: int) -> None:
        """Keep episode `number`, with the time that it took and the number of diverged ones before it. Raises DataError."""
        facts = {"collection_seconds": seconds, "diverged_episodes": diverged}
        with EpisodeWriter(self.place(number), {**self.attributes, **facts}) as writer:
            writer.write(episode)
        self.added(number)

    def place(self, number: int) -> Path:
        """The file of episode `number`, for another process to write, which then is `added`."""
        return self.folder / f"episode_{number:07d}.h5"

    def added(self, number: int) -> None:
        """Episode `number` is there."""
        self._shards[number] = self.place(number)

    def join(self, numbers: Iterable[int]) -> None:
        """Write what is to be made from these episodes, in order, and delete `folder`. Raises DataError, and then keeps the episodes."""
        numbers = list(numbers)
        if self._as_folder:
            whole = self.folder / WHOLE
            for first in range(0, len(numbers), EPISODES_A_FILE):
                self._write(whole / f"episodes_{first:07d}.h5", numbers[first : first + EPISODES_A_FILE])
            try:
                whole.rename(self.out)
            except OSError as error:
                raise DataError(f"{self.out}: cannot be written ({explain(error)})") from error
        else:
            self._write(self.out, numbers)
        self._shards.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, path: Path, numbers: list[int]) -> None:
        facts: list[dict[str, Any]] = []
        with EpisodeWriter(path, self.attributes) as writer:
            for number in numbers:
                facts.append(writer.copy(self._shards[number]))
            writer.annotate(**{name: sum(each[name] for each in facts) for name in ADDED_UP if name in facts[0]})

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # it holds episodes
            self.folder.rmdir()
        os.close(self._lock)

    def _locked(self) -> int:
        """A descriptor of the folder, which is created, with a lock on it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({explain(error)})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(f"--out {self.out}: another process is recording it; wait for it, or name another file") from error
        except OSError:
            pass  # some network file systems have no locks
        return descriptor

    def _read_finished(self) -> None:
        """Take over the whole episodes of the same settings."""
        names = sorted(self.folder.glob("episode_*.h5"))
        for path in names:
            try:
                with open_shard(path) as file:
                    recorded = read_attributes(file, path)
                    for name in check_shard(file, path, recorded, {}):
                        read_episode(file[name], path)
            except DataError as error:
                print(f"{error}; the episode is recorded again", file=sys.stderr)
                path.unlink()
                continue
            for key in SAME:
                wanted = self.attributes.get(key)
                wanted = tuple(wanted) if isinstance(wanted, list) else wanted
                if recorded.get(key) != wanted:
                    same = REMEDIES.get(key) or f"the same --{key.replace('_', '-')}"
                    raise DataError(
                        f"{path}: attribute '{key}' is {recorded.get(key)}, expected {wanted}; resume with {same}, or move {self.folder} "
                        "away to begin again"
                    )
            number = int(path.stem.removeprefix("episode_"))
            self._shards[number], self.facts[number] = path, recorded

    def _delete_finished(self) -> None:
        try:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be emptied ({explain(error)})") from error
