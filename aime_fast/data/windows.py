"""Which frames batch n holds: a function of the seed and of n only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Windows:
    """Cuts episodes, laid end to end, into sequences of T frames, and groups the sequences into batches of B.

    Each epoch tiles every episode with sequences from a new random offset; a sequence that would extend past either end is moved
    inside. So every frame, the first ones too, is in at least one sequence, most frames in exactly one. The sequences are shuffled;
    a remainder smaller than B is left out of the epoch. With fewer than B sequences a batch repeats them.

    Args:
        lengths: frames of each episode, at least T.
        sequence_length, batch_size: T, B.
        seed: of offsets and order.
    Attributes:
        steps_per_epoch: batches an epoch, at least 1.
    """

    def __init__(self, lengths: list[int], sequence_length: int, batch_size: int, seed: int):
        self.lengths = np.asarray(lengths)
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self._first = np.cumsum(self.lengths) - self.lengths  # row of each episode's first frame
        # Enough tiles to cover the episode from any offset in (-T, 0].
        self._count = np.where(self.lengths > sequence_length, -(-(self.lengths + sequence_length - 1) // sequence_length), 1)
        self.steps_per_epoch = max(1, int(self._count.sum()) // batch_size)
        self._epoch, self._starts = -1, np.empty(0, dtype=np.int64)

    def batch(self, number: int) -> Tensor:
        """Rows int64 [B, T] of batch `number`, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._starts = epoch, self._shuffled(epoch)
        index = np.arange(position * self.batch_size, (position + 1) * self.batch_size) % len(self._starts)
        return self._rows(self._starts[index])

    def stills(self, number: int) -> Tensor:
        """Rows int64 [B, T] of single frames for batch `number`, each drawn at random from all episodes."""
        random = np.random.default_rng([self.seed, number, 1])
        return torch.from_numpy(random.integers(self.lengths.sum(), size=(self.batch_size, self.sequence_length)))

    def in_order(self, limit: int | None = None) -> Iterator[Tensor]:
        """Rows int64 [<= B, T] of the sequences that start at 0, T, 2T, ... in each episode, in order.

        With `limit`, at most so many batches, of sequences spread evenly over all of them.
        """
        t = self.sequence_length
        starts = np.concatenate([first + np.arange(0, n - t + 1, t) for first, n in zip(self._first, self.lengths)])
        if limit is not None:
            count = min(limit * self.batch_size, len(starts))
            starts = starts[np.linspace(0, len(starts) - 1, count).round().astype(np.int64)]
        for begin in range(0, len(starts), self.batch_size):
            yield self._rows(starts[begin : begin + self.batch_size])

    def signature(self) -> dict[str, Any]:
        """The values that must be equal for batch n to hold the same frames."""
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "episodes": len(self.lengths),
            "frames": int(self.lengths.sum()),
        }

    def _shuffled(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        t = self.sequence_length
        starts = [
            first + np.clip(np.arange(count) * t - random.integers(t), 0, n - t)
            for first, n, count in zip(self._first, self.lengths, self._count)
        ]
        return random.permutation(np.concatenate(starts))

    def _rows(self, starts: np.ndarray) -> Tensor:
        return torch.from_numpy(starts[:, None] + np.arange(self.sequence_length))
