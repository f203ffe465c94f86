"""Replays that the processes of a run make together: what `test_replay_disk.py` looks at, called as `rank_replays.py FOLDER`.

Each rank writes what it has found as `RANK.json` in the folder, and frames into its folder `disk`.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from recordings import SMALL

from aime_fast.data import SyntheticEpisodes, make_batches, memory_map
from aime_fast.data.replay import Replay
from aime_fast.errors import DataError
from aime_fast.runtime import ranks


class Episodes(SyntheticEpisodes):
    """Four episodes, counted as they are read; the third of them may be damaged."""

    def __init__(self, damaged: bool = False):
        super().__init__(4, 40, seed=0)
        self.damaged, self.read = damaged, 0

    def read_episode(self, index: int):
        if self.damaged and index == 2:
            raise DataError("a.h5: episode 2 is damaged")
        self.read += 1
        return super().read_episode(index)


def unpack(damaged: bool = False) -> dict:
    """Makes a replay with the others. Returns the error, or the sums of all frames, and which files of the temporary folder are mapped."""
    source = Episodes(damaged)
    try:
        frames = Replay(source, [0, 1, 2, 3], [0, 100, 200, 300, 400], torch.device("cpu"), resident=False, together=True).frames
    except Exception as error:
        return {"error": [type(error).__name__, str(error)]}
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = sorted({line.split()[4] for line in lines if f"{tempfile.gettempdir()}/" in line})
    return {"read": source.read, "sums": [float(x.double().sum()) for x in frames.values()], "mapped": mapped}


def failing(*_: object) -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def main(folder: Path) -> None:
    found: dict[str, object] = {}
    tempfile.tempdir = str(folder / "disk")
    with ranks.joined(torch.device("cpu")):
        rank = ranks.of_run().rank
        found["together"] = unpack()

        place, ranks._place = ranks._place, lambda: ("machine", str(rank))
        found["on two machines"] = unpack()
        ranks._place = place

        open_file = memory_map._open_file
        memory_map._open_file = lambda file, path: open_file(file, path)._replace(inode=rank)
        found["out of sight"] = unpack()
        memory_map._open_file = open_file

        began = time.monotonic()
        found["damaged"] = unpack(damaged=rank == 0)
        map_found, memory_map._map_found = memory_map._map_found, failing
        found["not mapped"] = unpack()
        memory_map._map_found = map_found
        found["seconds"] = time.monotonic() - began

        found["again"] = unpack()
        parts = make_batches(dataclasses.replace(SMALL, prefetch=0), 0, share=ranks.of_run())
        found["batches"] = [next(part)["action"].tolist() for part in parts]
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
