"""GrowingReplay: a folder of episodes, one file each, to which new ones are added and from which the oldest go."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aime_fast.config import DataConfig
from aime_fast.data.batches import SequenceBatches, make_batches
from aime_fast.data.dataset import DMCVBDataset
from aime_fast.data.split import Split
from aime_fast.data.writer import EpisodeWriter
from aime_fast.errors import DataError


class Known(NamedTuple):
    """Of an episode."""

    identity: str  # as of `DMCVBDataset`
    frames: int


class GrowingReplay:
    """Episodes by number. What is trained on is a function of the numbers present, so a run that goes on finds the same batches.

    Every episode is held out or not by its number alone, in the shares of the config, whatever comes after it.

    Args:
        folder: `episode_0000012.h5` and so on; it is created.
        config: of the recordings; its fractions say how many are held out.
        attributes: of each file.
        next_number: of the next episode. Files from this number on, of a run that stopped later, are deleted.

    Attributes: next_number.
    """

    def __init__(self, folder: Path, config: DataConfig, attributes: Mapping[str, Any], next_number: int = 0):
        self.folder, self.config, self.attributes, self.next_number = folder, config, attributes, next_number
        self._known: dict[int, Known] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for number, path in self._found().items():
            if number >= next_number:
                path.unlink()

    def files(self) -> dict[int, Path]:
        """The episodes by number, oldest first; not those that another process is adding."""
        return {number: path for number, path in self._found().items() if number < self.next_number}

    def _found(self) -> dict[int, Path]:
        return {int(path.stem.removeprefix("episode_")): path for path in sorted(self.folder.glob("episode_*.h5"))}

    def add(self, episode: Mapping[str, np.ndarray]) -> None:
        """Writes an episode. Raises DataError if the disk is full or the like."""
        with EpisodeWriter(self.folder / f"episode_{self.next_number:07d}.h5", self.attributes) as writer:
            writer.write(episode)
        self.next_number += 1

    def known(self) -> dict[int, Known]:
        """What is known of the episodes that are there, by number. A file is opened once. Raises DataError if one is damaged."""
        files = self.files()
        if new := [number for number in files if number not in self._known]:
            source = DMCVBDataset([files[number] for number in new], 1)
            self._known |= dict(zip(new, map(Known, source.identities, source.lengths)))
            source.close()
        return {number: self._known[number] for number in files}

    def oldest(self, frames: int) -> set[int]:
        """Numbers of the oldest training episodes: without them at most `frames` frames to train on are left, or one episode."""
        training = {number: known.frames for number, known in self.known().items() if self.part(number) == "training"}
        left, staying = frames, set()
        for number, length in reversed(training.items()):
            left -= length
            if left < 0 and staying:
                break
            staying.add(number)
        return set(training) - staying

    def drop(self, numbers: set[int]) -> None:
        """Deletes episodes."""
        for number, path in self.files().items():
            if number in numbers:
                path.unlink()

    def part(self, number: int) -> str:
        """training, validation or test: the share of each among the first episodes is that of the config, the second two at least once."""
        held = {"validation": self.config.validation_fraction, "test": self.config.test_fraction}
        for offset, (name, fraction) in enumerate(held.items(), 1):
            every = max(3, round(1 / max(fraction, 1e-9)))
            if number % every == offset:
                return name
        return "training"

    def split(self, without: Collection[int] = ()) -> Split:
        """The identities of the episodes that are there, but for some. Raises DataError where a part of the split is empty."""
        identities: dict[str, list[str]] = {name: [] for name in Split._fields}
        for number, known in self.known().items():
            if number not in without:
                identities[self.part(number)].append(known.identity)
        if empty := [name for name, found in identities.items() if not found]:
            raise DataError(f"{self.folder}: no episode is there for {', '.join(empty)}; record more with --seed-episodes")
        return Split(**{name: tuple(found) for name, found in identities.items()})

    def batches(self, seed: int, device: torch.device) -> tuple[SequenceBatches, ...]:
        """(training, validation) batches of the episodes that are there now."""
        return make_batches(dataclasses.replace(self.config, data=str(self.folder)), seed, device, self.split())
