"""Measure how recorded pictures can be compressed: bytes a frame, and frames a second written and read.

The pictures of --data are written anew with each codec, in the chunks that `EpisodeWriter` uses and with HDF5's checksum, and read back:
whole episodes, and sequences of --sequence-length frames at random places. Codecs that h5py does not bring need `hdf5plugin`, also in the
programs that read the file; without it they are left out. Rates are in processor seconds of one thread. The file lies in --folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from aime_fast.data import DMCVBDataset
from aime_fast.data.episodes import CHUNK_FRAMES
from aime_fast.data.writer import PIXELS
from aime_fast.errors import DataError
from profiling.machine import describe, title
from profiling.rows import write_rows

SEQUENCES = 300  # read at random places


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench codecs`."""
    parser.add_argument("--data", required=True, metavar="FILE", help="HDF5 file or folder whose pictures are written")
    parser.add_argument("--sequence-length", type=int, default=10, metavar="T", help="default 10")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="default: the system's temporary folder")
    parser.add_argument("--json", metavar="FILE", help="write the rows here, each with machine, versions, commit and command")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Measure, print and write; returns the exit status."""
    try:
        data = DMCVBDataset(options.data, options.sequence_length)
        episodes = [data.read_episode(i)["pixels"].permute(0, 2, 3, 1).numpy() for i in range(data.num_episodes)]
    except DataError as error:
        usage_error(str(error))
    print(f"{title(torch.device('cpu'))}\n{'codec':<24}{'bytes/frame':>12}{'written/s':>12}{'read/s':>12}{'sequences: frames/s':>22}")
    rows = []
    for name, codec in codecs().items():
        row = {"codec": name} | measure(episodes, codec, options.sequence_length, options.folder)
        rows.append(row)
        rates = (row[rate] for rate in ("written_per_second", "read_per_second", "sequences_per_second"))
        print(f"{name:<24}{row['bytes_per_frame']:>12.0f}" + "".join(f"{rate:>{w}.0f}" for rate, w in zip(rates, (12, 12, 22))), flush=True)
    write_rows(options.json, describe("cpu"), rows)
    return 0


def codecs() -> dict[str, Mapping[str, Any]]:
    """Options of h5py's `create_dataset`, by name; the first is that of `EpisodeWriter`."""
    found: dict[str, Mapping[str, Any]] = {
        "gzip 1 (as written)": PIXELS, "none": {}, "gzip 4": {"compression": "gzip", "compression_opts": 4},
        "gzip 1, shuffled": {"compression": "gzip", "compression_opts": 1, "shuffle": True}, "lzf": {"compression": "lzf"},
    }  # fmt: skip
    try:
        import hdf5plugin
    except ImportError:
        return found
    return found | {
        "lz4": hdf5plugin.LZ4(), "zstd 1": hdf5plugin.Zstd(clevel=1), "blosc2 lz4": hdf5plugin.Blosc2("lz4", 5, hdf5plugin.Blosc2.SHUFFLE),
        "blosc2 zstd 1": hdf5plugin.Blosc2("zstd", 1, hdf5plugin.Blosc2.SHUFFLE), "bitshuffle lz4": hdf5plugin.Bitshuffle(cname="lz4"),
    }  # fmt: skip


def measure(episodes: list[np.ndarray], codec: Mapping[str, Any], length: int, folder: str) -> dict[str, float]:
    """One row: episodes uint8 [T, H, W, 3] of at least `length` frames, written and read with a codec."""
    frames = sum(map(len, episodes))
    random = np.random.default_rng(0)
    wanted = [(episode, random.integers(len(episodes[episode]) - length + 1)) for episode in random.integers(len(episodes), size=SEQUENCES)]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "codec.h5"
        written = _seconds(lambda: _write(path, episodes, codec))
        with h5py.File(path, "r") as file:
            size = sum(dataset.id.get_storage_size() for dataset in file.values())
            read = _seconds(lambda: [file[str(i)][()] for i in range(len(episodes))])
            sequences = _seconds(lambda: [file[str(episode)][begin : begin + length] for episode, begin in wanted])
    return {
        "bytes_per_frame": size / frames, "written_per_second": frames / written, "read_per_second": frames / read,
        "sequences_per_second": SEQUENCES * length / sequences,
    }  # fmt: skip


def _write(path: Path, episodes: Iterable[np.ndarray], codec: Mapping[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for i, pixels in enumerate(episodes):
            chunks = (min(CHUNK_FRAMES, len(pixels)), *pixels.shape[1:])
            file.create_dataset(str(i), data=pixels, chunks=chunks, fletcher32=True, **codec)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
