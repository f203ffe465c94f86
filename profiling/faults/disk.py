"""Disks that are full, at any moment of a command: one line with the remedy, nothing half-written, and with room the work goes on.

The disk is a small tmpfs. Where none may be mounted, and for a quarter of the faults, the size of files is limited instead.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from profiling.faults.kills import check_same_evaluation, printed_updates, remove_results
from profiling.faults.outcome import Outcome, Problem, attempt
from profiling.faults.process import Command
from profiling.faults.recordings import check_collected, kept
from profiling.faults.runs import Site, check_kept, check_nothing_left, check_same_run, check_whole, collecting, evaluating, training

SIZE = 32  # MiB
REMEDIES = ("free some space", "raise the limit on the size of files", "more room")
_mounted: set[Path] = set()


def mount(folder: Path) -> bool:
    """Mount an empty small disk on a folder; False where that is not allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "none", folder], capture_output=True, check=False)
    if done.returncode == 0:
        _mounted.add(folder)
    return done.returncode == 0


def unmount_all() -> None:
    """Give all disks back."""
    for folder in list(_mounted):
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)
        _mounted.discard(folder)


def disk(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """Commands on disks with too little room, or with a limit on the size of files."""
    may_mount = shutil.which("mount") is not None and mount(site.empty("disk"))
    unmount_all()
    if not may_mount:
        print("left out, no right to mount a tmpfs: full disks; the size of files is limited instead", flush=True)
    modules = ["train", "report", "evaluate"] + ["collect"] * (site.data is not None)
    for number in numbers:
        if time.monotonic() > until:
            return
        random = site.random("disk", number)
        module, limited = modules[number % len(modules)], not may_mount or number // len(modules) % 4 == 1
        name = "limit on the size of files" if limited else "full disk"
        needed = {"train": 14e6, "report": 0.4e6, "evaluate": 0.3e6, "collect": 0.4e6}[module]
        if limited:
            needed = {"train": 4.5e6, "report": 0.4e6, "evaluate": 0.1e6, "collect": 0.15e6}[module]
        # A third of the rooms are so small that the first files fail.
        room = int(random.uniform(0, needed) if random.random() < 0.67 else 10 ** random.uniform(3, 5))
        room = max(room, 20_000) if limited else room  # what the command prints goes to a file too
        yield attempt(
            f"{name}, {module}", f"number {number}, room for {room} bytes",
            lambda m=module, r=room, n=limited, x=random: _full(site, m, r, n, x),
        )  # fmt: skip


def _full(site: Site, module: str, room: int, limited: bool, random: np.random.Generator) -> str:
    outside = site.empty("disk")
    folder = outside / "on"
    folder.mkdir()
    if not limited and not mount(folder):
        raise Problem("lost", "the disk could not be mounted")
    try:
        return _on(site, module, room, limited, folder, random)
    finally:
        unmount_all()


def _on(site: Site, module: str, room: int, limited: bool, folder: Path, random: np.random.Generator) -> str:
    run, outside = folder / "run", folder.parent
    if module in ("report", "evaluate"):
        shutil.copytree(site.run, run)
        if random.random() < 0.5:
            remove_results(run, module)
    ballast = folder / "ballast"
    if not limited:
        free = shutil.disk_usage(folder).free
        with open(ballast, "wb") as file:
            file.write(bytes(max(0, free - room)))
    words = {
        "train": training(run, "--resume"),
        "report": [str(run)],
        "evaluate": evaluating(run),
        "collect": collecting(folder / "a.h5", 12, 1, "--resume"),
    }[module]
    tmp = folder / "tmp" if not limited and random.random() < 0.25 else outside / "tmp"
    with contextlib.suppress(OSError):
        tmp.mkdir(exist_ok=True)
    tmp = tmp if tmp.is_dir() else outside
    command = Command(f"aime_fast.{module}", words, outside, file_size=room if limited else None, tmp=tmp)
    status = command.check(0, 2)
    if status == 2 and not any(remedy in command.err for remedy in REMEDIES):
        raise Problem("lost", f"no remedy: {command.last_line()}")
    said, before = command.last_line(), []
    check_nothing_left(folder, allowed=(r"a\.h5\.unfinished", "^tmp$"))
    check_whole(folder)
    if module == "collect":
        before = [] if (folder / "a.h5").exists() else kept(folder)
    elif run.exists():
        check_kept(run, printed_updates(command.out))
    ballast.unlink(missing_ok=True)
    Command(f"aime_fast.{module}", words, outside).check(0)
    if module == "collect":
        check_collected(folder, before)
    else:
        check_same_run(run, site.run)
    if module == "evaluate":
        check_same_evaluation(run, site.run)
    return said
