"""Kills of `collect`, its main process or a worker: finished episodes stay, and the same command adds the others."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from aime_fast.data import DMCVBDataset
from aime_fast.errors import DataError
from profiling.faults.kills import choose_signal, statuses
from profiling.faults.outcome import Outcome, Problem, attempt
from profiling.faults.process import Command
from profiling.faults.runs import Site, check_nothing_left, collecting

EPISODES = 12
MOST = 3  # kills of one collection


def kept(folder: Path) -> list[str]:
    """Identities of the finished episodes of a collection that ended early. Raises Problem where one is not whole."""
    try:
        return [identity for path in sorted((folder / "a.h5.unfinished").glob("*.h5")) for identity in identities(path)]
    except DataError as error:
        raise Problem("lost", error) from None


def identities(path: Path) -> list[str]:
    """Of the episodes in a file, every one of which is read and compared with its checksum."""
    data = DMCVBDataset(path, 1)
    try:
        for index in range(data.num_episodes):
            data.read_episode(index)
        return data.identities
    finally:
        data.close()


def check_collected(folder: Path, before: list[str]) -> None:
    """Raise Problem unless a.h5 is complete, holds the episodes `before` first and none twice, and nothing else is left."""
    try:
        found = identities(folder / "a.h5")
    except DataError as error:
        raise Problem("lost", error) from None
    if found[: len(before)] != before:
        raise Problem("lost", "episodes that were finished are not in the file")
    if len(found) != EPISODES or len(set(found)) != EPISODES:
        raise Problem("lost", f"{len(found)} episodes, {len(set(found))} different ones, expected {EPISODES}")
    check_nothing_left(folder, allowed=("^tmp$", "^tmp"))


def collect(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """Collections that are killed, and go on, several times."""
    if site.data is None:
        return
    for number in numbers:
        if time.monotonic() > until:
            return
        yield from _chain(site, number, site.random("collect", number))


def _chain(site: Site, number: int, random: np.random.Generator) -> Iterator[Outcome]:
    folder, before = site.empty("collect"), []
    workers = 1 + number % 2
    for kill in range(MOST + 1):
        command = Command("aime_fast.collect", collecting("a.h5", EPISODES, workers, "--resume"), folder)
        seconds = random.uniform(0, site.seconds["collect"] * (1.0 if workers == 1 else 3.0))
        if kill == MOST or command.wait(seconds) is not None:
            break
        worker = worker_of(command) if workers > 1 and random.random() < 0.5 else None
        signum = signal.SIGKILL if worker else choose_signal(random)

        def killed(command=command, signum=signum, worker=worker) -> str:
            if worker:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signum)
                command.check(0, 2)
            else:
                command.signal(signum, group=bool(random.random() < 0.5))
                command.check(*statuses(signum))
            if (folder / "a.h5").exists():
                check_collected(folder, before)
                return "complete"
            found = kept(folder)
            if found[: len(before)] != before:
                raise Problem("lost", f"{len(before)} episodes were finished before, {len(found)} are there")
            before[:] = found
            return f"{len(found)} episodes kept"

        who = "a worker of collect" if worker else "collect"
        outcome = attempt(f"kill of {who}", f"chain {number}, kill {kill}, {signum.name}", killed, command.words)
        yield outcome
        if outcome.verdict != "survived":
            return

    def finished() -> None:
        command.check(0)
        check_collected(folder, before)

    yield attempt("resumed collect, compared", f"chain {number}", finished, command.words)


def worker_of(command: Command) -> int | None:
    """The newest worker process of a collection."""
    found = []
    for pid in command.family():
        with contextlib.suppress(OSError):
            if "multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found[-1] if found else None
