"""Damaged files: a bit flipped, a sector zeroed, an end cut off. They are refused in one line, or what is read equals the original."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from aime_fast.data import DMCVBDataset
from aime_fast.errors import UserError
from aime_fast.reporting.page import write_report
from aime_fast.reporting.records import read_record
from aime_fast.training.checkpoint import list_checkpoints, read_checkpoint
from profiling.faults.kills import check_same_evaluation
from profiling.faults.outcome import Outcome, attempt
from profiling.faults.process import Command, isolated
from profiling.faults.runs import Site, check_same_run, evaluating, fingerprint, training

COUNT = 300  # damages of each checkpoint or data file
TEXTS = 60  # of text files, read by the report


class Target(NamedTuple):
    """A file to damage, what reads it, and the bytes that are its structure, not its content."""

    name: str
    path: Path
    read: Callable[[Path], object]
    structure: np.ndarray


def damage(data: bytes, random: np.random.Generator, structure: np.ndarray) -> tuple[str, bytes]:
    """Damaged data, and what was done to them. Half of all flips hit the structure."""
    damaged, how = bytearray(data), random.random()
    if how < 0.8:
        place = int(random.choice(structure)) if random.random() < 0.5 else int(random.integers(len(data)))
        bit = int(random.integers(8))
        damaged[place] ^= 1 << bit
        return f"bit {bit} of byte {place} flipped", bytes(damaged)
    place = int(random.integers(len(data)))
    if how < 0.9:
        return f"cut off at byte {place}", bytes(damaged[:place])
    place -= place % 512
    damaged[place : place + 512] = bytes(len(damaged[place : place + 512]))
    return f"512 bytes from {place} zeroed", bytes(damaged)


def read_data(path: Path) -> dict:
    """Everything that a data file says: attributes, lengths, identities, frames."""
    data = DMCVBDataset(path, 10)
    try:
        episodes = [dict(data.read_episode(index).items()) for index in range(data.num_episodes)]
        return {**data.attributes, "lengths": data.lengths, "identities": data.identities, "episodes": episodes}
    finally:
        data.close()


def headers(path: Path) -> np.ndarray:
    """Positions in an archive that are no tensor's."""
    is_structure = np.ones(path.stat().st_size, dtype=bool)
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                end = entry.header_offset + 30 + len(entry.filename)
                with open(path, "rb") as file:
                    file.seek(entry.header_offset + 28)
                    begin = end + int.from_bytes(file.read(2), "little")
                is_structure[begin : begin + entry.compress_size] = False
    return np.flatnonzero(is_structure)


def flips(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """Checkpoints and data files are damaged and read."""
    numbers = list(islice(numbers, COUNT))
    checkpoint = list_checkpoints(site.run)[-1]
    targets = [Target("checkpoint", checkpoint, read_checkpoint, headers(checkpoint))]
    if site.data is not None:
        targets.append(Target("data file", site.data, read_data, np.arange(2048)))
    for place, target in enumerate(targets, 1):
        limit = time.monotonic() + (until - time.monotonic()) / (len(targets) + 1 - place)
        yield from _flips(site, target, numbers, limit)


def _flips(site: Site, target: Target, numbers: list[int], until: float) -> Iterator[Outcome]:
    original, expected = target.path.read_bytes(), fingerprint(target.read(target.path))
    path = site.empty("flips") / target.path.name

    def read(number: int) -> str:
        _, damaged = damage(original, site.random(target.name, number), target.structure)
        path.write_bytes(damaged)
        try:
            found = fingerprint(target.read(path))
        except UserError as error:
            return f"survived refused: {error}" if "\n" not in str(error) else f"lost {error}"
        except BaseException as error:
            return f"traceback {type(error).__name__}: {error}"
        return "survived read, and equal" if found == expected else "silent read, and different"

    for number, answer in isolated(read, numbers):
        verdict, _, seen = answer.partition(" ")
        how, _ = damage(original, site.random(target.name, number), target.structure)
        yield Outcome(f"damage to a {target.name}", f"number {number}, {how}", verdict, seen)
        if time.monotonic() > until:
            return


def records(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """Files of a run are damaged; `train`, `evaluate` and `report` then do what they do, or refuse in one line."""
    for number in numbers:
        if time.monotonic() > until:
            return
        random = site.random("records", number)
        module = ("train", "evaluate", "report")[number % 3]
        names = [path.name for path in list_checkpoints(site.run)[-1:]]
        if module != "evaluate":
            names += ["metrics.jsonl", "run.json", "config.yaml", "evaluation/evaluation.json"][: 4 if module == "report" else 3]
        name = str(random.choice(names))
        how, damaged = damage((site.run / name).read_bytes(), random, np.arange(1))
        yield attempt(
            f"damage to a run, then {module}", f"number {number}, {name}: {how}",
            lambda m=module, n=name, d=damaged: _record(site, m, n, d),
        )  # fmt: skip


def _record(site: Site, module: str, name: str, damaged: bytes) -> str:
    run = site.copy_of_run("records")
    (run / name).write_bytes(damaged)
    words = {"train": training("run", "--resume"), "evaluate": evaluating(run), "report": [str(run)]}[module]
    command = Command(f"aime_fast.{module}", words, run.parent)
    status = command.check(*((0,) if module == "train" else (0, 2)))
    if module == "train" and name != "metrics.jsonl":
        check_same_run(run, site.run, allowed=(r"\.damaged",))
    if module == "evaluate" and status == 0 and "damaged" not in command.out:  # else that of the checkpoint before
        check_same_evaluation(run, site.run)
    return command.last_line()


def texts(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """The text files of a run have no checksums: damaged or edited ones are refused in one line, or reported as what they then say."""
    run, names = site.copy_of_run("records"), ("metrics.jsonl", "run.json", "config.yaml", "evaluation/evaluation.json")
    originals = {name: (run / name).read_bytes() for name in names}

    def choose(number: int) -> tuple[str, str, bytes]:
        random = site.random("records read", number)
        name = str(random.choice(names[1:] if number % 2 else names))
        return name, *(edit if number % 2 else damage)(originals[name], random, np.arange(1))

    def read(number: int) -> str:
        name, _, damaged = choose(number)
        (run / name).write_bytes(damaged)
        try:
            write_report(read_record(run), "no model", run / "report.html")
        except UserError as error:
            return f"survived refused: {error}" if "\n" not in str(error) else f"lost {error}"
        except BaseException as error:
            return f"traceback {type(error).__name__}: {error}"
        finally:
            (run / name).write_bytes(originals[name])
        return "survived read"

    for number, answer in isolated(read, list(islice(numbers, TEXTS))):
        verdict, _, seen = answer.partition(" ")
        yield Outcome("damage to a text file of a run", f"number {number}, {': '.join(choose(number)[:2])}", verdict, seen)
        if time.monotonic() > until:
            return


def edit(data: bytes, random: np.random.Generator, _: np.ndarray) -> tuple[str, bytes]:
    """A JSON or YAML file in which one value is replaced by one of another type, and what was done."""
    content = yaml.safe_load(data)
    node, path = content, []
    while isinstance(node, dict) and node and (not path or random.random() < 0.6):
        path.append(str(random.choice(sorted(node))))
        parent, node = node, node[path[-1]]
    parent[path[-1]] = [None, -1, "text", [1], {}][random.integers(5)]
    return f"{'.'.join(path)} is now {parent[path[-1]]!r}", json.dumps(content).encode()
