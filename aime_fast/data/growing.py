"""GrowingReplay: a folder of episodes, one file each, to which new ones are added and from which the oldest go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from aime_fast.config import DataConfig
from aime_fast.data.batches import SequenceBatches, make_batches
from aime_fast.data.dataset import DMCVBDataset
from aime_fast.data.split import Split
from aime_fast.data.writer import EpisodeWriter
from aime_fast.errors import DataError


class GrowingReplay:
    """Episodes by number. What is trained on is a function of the numbers present, so a run that goes on finds the same batches.

    Every episode is held out or not by its number alone, in the shares of the config, whatever comes after it.

    Args:
        folder: `episode_00012.h5` and so on; it is created.
        config: of the recordings; its fractions say how many are held out.
        attributes: of each file.
        next_number: of the next episode. Files from this number on, of a run that stopped later, are deleted.

    Attributes: next_number.
    """

    def __init__(self, folder: Path, config: DataConfig, attributes: Mapping[str, Any], next_number: int = 0):
        self.folder, self.config, self.attributes, self.next_number = folder, config, attributes, next_number
        folder.mkdir(parents=True, exist_ok=True)
        for number, path in self.files().items():
            if number >= next_number:
                path.unlink()

    def files(self) -> dict[int, Path]:
        """The episodes by number, oldest first."""
        return {int(path.stem.removeprefix("episode_")): path for path in sorted(self.folder.glob("episode_*.h5"))}

    def add(self, episode: Mapping[str, np.ndarray]) -> None:
        """Writes an episode. Raises DataError if the disk is full or the like."""
        with EpisodeWriter(self.folder / f"episode_{self.next_number:07d}.h5", self.attributes) as writer:
            writer.write(episode)
        self.next_number += 1

    def drop_oldest(self, frames: int) -> int:
        """Deletes the oldest training episodes until at most `frames` frames are left, or one; returns how many were deleted."""
        training = {number: path for number, path in self.files().items() if self.part(number) == "training"}
        lengths = {}
        for number, path in training.items():
            with h5py.File(path, "r") as file:
                lengths[number] = len(file["episode_00000/action"])
        dropped = 0
        for number in list(training)[:-1]:
            if sum(lengths.values()) <= frames:
                break
            del lengths[number]
            training[number].unlink()
            dropped += 1
        return dropped

    def part(self, number: int) -> str:
        """training, validation or test: the share of each among the first episodes is that of the config, the second two at least once."""
        held = {"validation": self.config.validation_fraction, "test": self.config.test_fraction}
        for offset, (name, fraction) in enumerate(held.items(), 1):
            every = max(3, round(1 / max(fraction, 1e-9)))
            if number % every == offset:
                return name
        return "training"

    def batches(self, seed: int, device: torch.device) -> tuple[SequenceBatches, SequenceBatches]:
        """(training, validation) batches of the episodes that are there now."""
        data, files = str(self.folder), self.files()
        if missing := {"training", "validation", "test"} - {self.part(number) for number in files}:
            raise DataError(f"{self.folder}: no episode is there for {', '.join(sorted(missing))}; record more with --seed-episodes")
        source = DMCVBDataset(data, 1)
        identities: dict[str, list[str]] = {name: [] for name in Split._fields}
        for number, name in zip(files, source.identities):
            identities[self.part(number)].append(name)
        source.close()
        split = Split(**{name: tuple(found) for name, found in identities.items()})
        config = DataConfig(**{**vars(self.config), "data": data})
        return make_batches(config, seed, device, split)
