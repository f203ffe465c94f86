"""The run that is disturbed, and whether what a disturbed one left is right."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aime_fast.training.checkpoint import list_checkpoints, read_checkpoint
from profiling.faults.outcome import Problem

STEPS, EVERY, PHASE = 8, 2, 6  # joint updates, updates from checkpoint to checkpoint, updates of the latent phase
SMALL = ("--tier", "debug", "--image-size", "16", "--episodes", "3")
TIMES = ("time", "frames_per_second")  # in rows, what no two runs have alike
NOT_COMPUTED = ("seconds", "logged", "config")  # in a checkpoint, likewise


class Updates(NamedTuple):
    """What a run has made: joint updates, and then those of the latent phase."""

    joint: int = 0
    latent: int = 0

    def __str__(self) -> str:
        return f"{self.joint} joint and {self.latent} latent updates"


@dataclass
class Site:
    """Where the campaign works, and what undisturbed commands gave.

    Attributes:
        folder: temporary. seed: of all faults. lane: name of the folder of one lane. seconds: of each undisturbed command, forked.
        data: a recorded file, or None where nothing can be rendered. run: folder of the reference run.
    """

    folder: Path
    seed: int
    lane: str = "."
    seconds: dict[str, float] = field(default_factory=dict)
    data: Path | None = None

    @property
    def run(self) -> Path:
        return self.folder / "reference"

    def random(self, kind: str, number: int) -> np.random.Generator:
        """The random numbers of one fault."""
        return np.random.default_rng([self.seed, zlib.crc32(kind.encode()), number])

    def empty(self, name: str) -> Path:
        """A new empty folder, in the place of one of the same name."""
        folder = self.folder / self.lane / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def copy_of_run(self, name: str) -> Path:
        """A copy of the reference run in a new folder."""
        return Path(shutil.copytree(self.run, self.empty(name) / "run"))


def training(run_dir: Path | str, *more: str) -> list[str]:
    """The arguments of the run."""
    words = [*SMALL, "--data", "synthetic", "--threads", "1", "--steps", str(STEPS), "--checkpoint-every", str(EVERY)]
    words += ["--validate-every", "4", "--sample-every", "4", "--validation-fraction", "0.3"]
    words += ["--latent-phase-updates", str(PHASE), "--latent-phase-frames", "2", "--latent-phase-batch-size", "4"]
    return [*words, "--run-dir", str(run_dir), *more]


def evaluating(run: Path, *more: str) -> list[str]:
    """The arguments of an evaluation."""
    return [str(run), "--samples", "1", "--horizon", "4", "--context", "2", "--clips", "1", *more]


def collecting(out: Path | str, episodes: int = 6, workers: int = 1, *more: str) -> list[str]:
    """The arguments of a collection."""
    words = [*SMALL[:4], "--frame-skip", "20", "--episodes", str(episodes), "--workers", str(workers), "--no-progress"]
    return [*words, "--out", str(out), *more]


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    try:
        found = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise Problem("lost", f"metrics.jsonl: {error}") from None
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


def fingerprint(value: Any) -> str:
    """A checksum of nested dictionaries, lists, tensors and numbers; equal only for equal bits."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for name in sorted(value, key=str):
                digest.update(f"{name!r}:".encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)}[".encode())
            for entry in value:
                add(entry)
        elif isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def computed(checkpoint: Path) -> str:
    """A checksum of everything that a run computed until this checkpoint."""
    return fingerprint({name: value for name, value in _read(checkpoint).items() if name not in NOT_COMPUTED})


def _read(checkpoint: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(checkpoint)
    except ValueError as error:
        raise Problem("lost", error) from None


def newest_step(run: Path) -> int:
    """Of the newest checkpoint; 0 without one."""
    found = list_checkpoints(run)
    return int(found[-1].stem.split("_")[1]) if found else 0


def kept_updates(run: Path) -> Updates:
    """Those in the newest checkpoint; none without one."""
    found = list_checkpoints(run)
    phase = _read(found[-1])["latent_phase"] if found else None
    if phase is None:
        return Updates(newest_step(run))
    progress = phase["progress"]  # None: the phase is done; {}: it has not begun
    return Updates(newest_step(run), PHASE if progress is None else progress.get("update", 0))


def check_kept(run: Path, printed: Updates, interval: int = EVERY) -> Updates:
    """What a run has kept. Raises Problem if that is more than `interval` updates less than it has printed, or a file is not whole."""
    for path in list_checkpoints(run):
        computed(path)
    check_whole(run)
    kept = kept_updates(run)
    if sum(printed) - sum(kept) > interval:
        raise Problem("lost", f"printed: {printed}; the newest checkpoint has {kept}")
    return kept


def check_went_on(out: str, kept: Updates) -> None:
    """Raise Problem unless the run that has printed `out` went on from what was kept."""
    joint, first = re.search(r", steps (\d+) to ", out), re.search(r", then updates (\d+) to ", out)
    if joint and int(joint[1]) != kept.joint:
        raise Problem("lost", f"went on from step {joint[1]}, kept: {kept}")
    if first and int(first[1]) != kept.latent + 1:
        raise Problem("lost", f"went on with update {first[1]} of the latent phase, kept: {kept}")


def check_whole(folder: Path) -> None:
    """Raise Problem if a picture, video, report or JSON file in a folder is cut short."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in WHOLE:
            data = path.read_bytes()
            try:
                good = WHOLE[path.suffix](data)
            except (ValueError, OSError, SyntaxError):
                good = False
            if not good:
                raise Problem("lost", f"{path.name} is not whole, {len(data)} bytes")


def _whole_video(data: bytes) -> bool:
    position, boxes = 0, []
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        boxes.append(data[position + 4 : position + 8])
        position += max(size, 8)
    return position == len(data) and b"moov" in boxes and b"mdat" in boxes


WHOLE = {
    ".png": lambda data: data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82"),
    ".html": lambda data: data.rstrip().endswith(b"</html>"),
    ".json": lambda data: isinstance(json.loads(data), dict),
    ".yaml": lambda data: data.endswith(b"\n"),
    ".mp4": _whole_video,
}


def check_nothing_left(folder: Path, allowed: Sequence[str] = ()) -> None:
    """Raise Problem if temporary or damaged files are in a folder, but names that match one of the expressions `allowed`."""
    left = [path.name for path in folder.rglob("*") if re.search(r"\.tmp$|\.part|\.damaged|\.unfinished|^tmp", path.name)]
    if left := [name for name in left if not any(re.search(each, name) for each in allowed)]:
        raise Problem("lost", f"left behind: {', '.join(sorted(left)[:4])}")


def check_same_run(run: Path, reference: Path, allowed: Sequence[str] = ()) -> None:
    """Raise Problem unless a finished run has the rows, to the bit, the weights and the files of the reference."""
    check_nothing_left(run, allowed)
    check_whole(run)
    if newest_step(run) != STEPS:
        raise Problem("lost", f"the newest checkpoint is of step {newest_step(run)}, expected {STEPS}")
    found, expected = rows(run), rows(reference)
    for number, (one, other) in enumerate(zip(found, expected), 1):
        if one != other:
            names = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
            raise Problem("silent", f"row {number} of metrics.jsonl is not that of an undisturbed run: {', '.join(sorted(names)[:3])}")
    if len(found) != len(expected):
        raise Problem("lost", f"{len(found)} rows in metrics.jsonl, expected {len(expected)}")
    if computed(list_checkpoints(run)[-1]) != computed(list_checkpoints(reference)[-1]):
        raise Problem("silent", "the last checkpoint differs from that of an undisturbed run")
    missing = _names(reference) - _names(run)
    if missing:
        raise Problem("lost", f"missing: {', '.join(sorted(missing))}")


def _names(run: Path) -> set[str]:
    """Of the files that every finished run has."""
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("checkpoint_", "evaluation"))}
