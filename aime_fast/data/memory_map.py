"""Frames in a memory map of files without names, which the processes of a machine share."""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import IO, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from aime_fast.errors import DataError, explain
from aime_fast.runtime import ranks

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of each entry of one frame


class OpenFile(NamedTuple):
    """A file without a name that a process has open."""

    path: str  # under which the other processes of the machine can open it, as long as it is open there
    device: int
    inode: int


def map_frames(layout: Layout, frames: int, fill: Callable[[TensorDict], object], together: bool = False) -> TensorDict:
    """Frames in a memory map, TensorDict [frames], filled by `fill`.

    Args: together: all processes of the run call this now. The first one of each machine fills a map, and the others map its files, which
    takes the memory and the disk of one.

    Raises: DataError: the disk is too small, or the temporary folder cannot be used. RankError: an error in another process.
    """
    if together:
        return _map_together(layout, frames, fill)
    with ExitStack() as files:
        made, _ = _store(layout, frames, files)
    fill(made)
    return made


def _map_together(layout: Layout, frames: int, fill: Callable[[TensorDict], object]) -> TensorDict:
    first, made, opened = ranks.neighbours()[0], None, {}
    with ExitStack() as files:  # they stay open until all have mapped them
        with ranks.failing_together():
            if ranks.of_run().rank == first:
                made, opened = _store(layout, frames, files)
                fill(made)
        found = ranks.told({key: _open_file(file, f"/proc/{os.getpid()}/fd/{file.fileno()}") for key, file in opened.items()})[first]
        with ranks.failing_together():
            if made is None:
                made = _map_found(layout, frames, found)
            if made is None:
                made = map_frames(layout, frames, fill)
    return made


def _store(layout: Layout, frames: int, files: ExitStack) -> tuple[TensorDict, dict[str, IO[bytes]]]:
    """Room for frames, and the files with it, open until `files` is closed.

    The system frees their space when they are closed and nothing maps them any more, however the processes end. It is reserved before a
    file is mapped: writing to a map of a full disk would end the process with SIGBUS.
    """
    tensors, opened = {}, {}
    for key, (shape, dtype) in layout.items():
        needed, folder = frames * math.prod(shape) * dtype.itemsize, "TMPDIR"
        try:
            folder = tempfile.gettempdir()
            opened[key] = files.enter_context(tempfile.TemporaryFile(prefix="aime_fast-", buffering=0))  # noqa: SIM115
            _reserve(opened[key].fileno(), needed)
            tensors[key] = _mapped(opened[key], (frames, *shape), dtype)
        except OSError as error:
            raise DataError(
                f"{folder}: {needed / 2**30:.3g} GiB of unpacked episodes cannot be stored there ({explain(error)}); "
                f"set TMPDIR to a folder on a disk with more room"
            ) from error
    return TensorDict(tensors, batch_size=[frames]), opened


def _reserve(descriptor: int, size: int) -> None:
    """Give a file `size` bytes of disk. Raises OSError if there are not as many."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = memoryview(bytes(1 << 20))
    while size > 0:
        size -= os.write(descriptor, zeros[:size])


def _mapped(file: IO[bytes], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in an open file of its size."""
    return torch.frombuffer(mmap.mmap(file.fileno(), math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def _open_file(file: IO[bytes], path: str) -> OpenFile:
    found = os.fstat(file.fileno())
    return OpenFile(path, found.st_dev, found.st_ino)


def _map_found(layout: Layout, frames: int, found: Mapping[str, OpenFile]) -> TensorDict | None:
    """The frames that another process has stored; None, and a line says so, where its files cannot be opened."""
    tensors = {}
    try:
        for key, (shape, dtype) in layout.items():
            with open(found[key].path, "r+b", buffering=0) as file:
                if _open_file(file, found[key].path) != found[key]:
                    raise OSError(errno.ESTALE, "another file", found[key].path)
                tensors[key] = _mapped(file, (frames, *shape), dtype)
    except OSError as error:
        print(f"episodes that another process has unpacked cannot be mapped ({explain(error)}): unpacking them again", file=sys.stderr)
        return None
    return TensorDict(tensors, batch_size=[frames])
