"""Sums: what the measures of held-out batches add up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aime_fast.runtime import ranks


class Sums:
    """Sums by name, in float64. They stay on the device until they are read."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds a number or tensor, of one shape for each name."""
        value = torch.as_tensor(value).detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def join(self) -> None:
        """Adds up what all processes of the run have; each of them may lack names, or all. A collective: all are to call it as often."""
        parts, self._sums = ranks.collected(self._sums), {}
        for part in parts:
            for name, value in part.items():
                self.add(name, value)

    def __getitem__(self, name: str) -> Tensor:
        return self._sums[name]

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)
