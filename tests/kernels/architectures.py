"""Architectures whose committed launches differ: without a GPU, equal launches are the same test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kernels.backend import ARCHITECTURES


def distinct(*tables: Mapping[int, Any]) -> list[int]:
    """The architectures for which `tables` differ from those of all before; all of them on a GPU."""
    first = {repr([table[arch] for table in tables]): arch for arch in reversed(ARCHITECTURES)}
    return list(ARCHITECTURES) if torch.cuda.is_available() else sorted(first.values())
