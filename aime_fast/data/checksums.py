"""Checksums of what an episode file says: its frames, its attributes and its list of episodes.

HDF5 has checksums of its own for chunks and, in the newer format, for metadata. They do not cover strings in attributes, nor a part that
was removed or replaced as a whole. These do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

IDENTITY_DIGITS = 16


def episode_sha256(episode: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of an episode's arrays, in hexadecimal. The order of the names does not matter."""
    digest = hashlib.sha256()
    for name in sorted(episode):
        value = np.ascontiguousarray(episode[name])
        digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def attributes_sha256(attributes: Mapping[str, Any], episodes: Mapping[str, str]) -> str:
    """SHA-256 of a file's attributes (Python values) and of the checksums of its episodes by name, in hexadecimal."""
    return hashlib.sha256(json.dumps([dict(attributes), dict(episodes)], sort_keys=True, default=repr).encode()).hexdigest()


def identity(sha256: str) -> str:
    """The short name of an episode: the first 16 digits of its checksum."""
    return sha256[:IDENTITY_DIGITS]
