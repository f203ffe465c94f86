"""Disturb aime_fast in every way that ought to be harmless: `python -m profiling.faults [--minutes 10] [--seed 0] [--kinds ...]`.

Prints a table of faults tried, survived and not, then one line for each that was not survived; the exit status is 1 if there is one.
`--kinds K --first N --most 1` with the same seed repeats one fault. Needs Linux; uses a small tmpfs where it may mount one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aime_fast.cli import parse_arguments
from aime_fast.errors import Interrupted
from profiling.faults import disk, fields, flips, folders, kills, process, recordings
from profiling.faults.outcome import Outcome, Problem, table
from profiling.faults.runs import PHASE, STEPS, Site, collecting, evaluating, training
from profiling.machine import describe, title, write_json

Kind = Callable[[Site, Iterator[int], float], Iterator[Outcome]]
# Two lanes run beside each other. A kind takes its share of what time is left to its lane; the last one takes all of it. First come those
# that end by themselves: what is left of their time goes to the processes.
LANES: tuple[dict[str, tuple[Kind, float]], ...] = (
    {
        "fields": (fields.fields, 0.08), "commands": (fields.commands, 0.1), "folders": (folders.folders, 0.25),
        "start-up": (kills.start_up, 0.12), "train": (kills.train, 0.45),
    },
    {
        "flips": (flips.flips, 0.05), "texts": (flips.texts, 0.05), "records": (flips.records, 0.15), "disk": (disk.disk, 0.35),
        "pictures": (kills.pictures, 0.15), "collect": (recordings.collect, 0.25),
    },
)  # fmt: skip
KINDS = tuple(name for lane in LANES for name in lane)
RESERVE = 30.0  # seconds that the last fault of a lane may take


@dataclass(frozen=True)
class FaultsConfig:
    """How much to try."""

    minutes: float = 10.0  # for everything
    seed: int = 0  # of all faults
    kinds: tuple[str, ...] = KINDS  # of faults
    first: int = 0  # number of the first fault of each kind
    most: int = 1_000_000  # faults of each kind; a chain of kills counts as one
    out: str | None = None  # JSON file for the outcomes


def prepare(site: Site) -> None:
    """Run every command undisturbed, once. Raises Problem where one fails."""
    for name, words in (
        ("train", training("reference")),
        ("evaluate", evaluating(Path("reference"))),
        ("report", ["reference"]),
        ("collect", collecting("data.h5")),
    ):
        command = process.Command(f"aime_fast.{name}", words, site.folder)
        status = command.check(0, 2) if name == "collect" else command.check(0)
        if name == "train" and (printed := kills.printed_updates(command.out)) != (STEPS, PHASE):
            raise Problem("lost", f"its lines are not understood: {printed}, not {STEPS} and {PHASE}")
        site.seconds[name] = time.monotonic() - command.began
        if name == "collect":
            site.data = site.folder / "data.h5" if status == 0 else None
            if status:
                print(f"left out, nothing renders here: collections ({command.last_line()})", flush=True)


def run_lane(number: int, config: FaultsConfig, site: Site, until: float) -> None:
    """Try the kinds of one lane until that time, and write their outcomes to a file."""
    kinds = {name: kind for name, kind in LANES[number].items() if name in config.kinds}
    with open(site.folder / f"lane{number}.pickle", "wb", buffering=0) as file:
        for place, (name, (kind, share)) in enumerate(kinds.items()):
            rest = sum(other for _, other in list(kinds.values())[place:])
            limit = time.monotonic() + (until - time.monotonic()) * share / rest
            numbers = itertools.islice(itertools.count(config.first), config.most)
            for outcome in _outcomes(name, kind(site, numbers, limit)):
                pickle.dump(outcome, file)
                if outcome.verdict != "survived":
                    print(outcome, flush=True)
                    process.end_all()  # what a check has left


def _outcomes(name: str, found: Iterator[Outcome]) -> Iterator[Outcome]:
    """Those of one kind; an exception between two faults is the last one."""
    try:
        yield from found
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"between two faults ({Path(place.filename).name}, line {place.lineno})"
        yield Outcome(name, where, "lost", f"{type(error).__name__}: {error}")


def fork_lane(number: int, config: FaultsConfig, site: Site, until: float) -> int:
    """`run_lane` in a child process; returns its number."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        signal.signal(signal.SIGTERM, _stop)
        run_lane(number, config, dataclasses.replace(site, lane=f"lane{number}"), until)
        status = 0
    except (Interrupted, KeyboardInterrupt):
        status = 3
    except BaseException:
        traceback.print_exc()
    finally:
        process.end_all()
        disk.unmount_all()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _stop(signum: int, _frame: object) -> None:
    raise Interrupted(signum)


def wait_for_lanes(lanes: dict[int, int], deadline: float) -> list[str]:
    """Wait for the lanes (process: number), stop them at the deadline; returns what went wrong with them."""
    problems = []
    try:
        while lanes:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in lanes:
                number, code = lanes.pop(pid), os.waitstatus_to_exitcode(status)
                if code == 3:
                    print(f"lane {number} was stopped at the time limit; the fault in progress is not counted")
                elif code:
                    problems.append(f"lane {number} of the campaign ended with status {code}")
            elif time.monotonic() > deadline:
                deadline += 20
                for each in lanes:
                    os.kill(each, signal.SIGTERM)
            time.sleep(0.05)
    finally:
        for each in lanes:  # those that still run, where this process was interrupted
            os.kill(each, signal.SIGTERM)
        for each in lanes:
            os.waitpid(each, 0)
    return problems


def read_outcomes(site: Site) -> Iterator[Outcome]:
    """What the lanes have written."""
    for path in sorted(site.folder.glob("lane*.pickle")):
        with open(path, "rb") as file, contextlib.suppress(EOFError, pickle.UnpicklingError):  # a last one that a kill has cut
            while True:
                yield pickle.load(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, try the faults, print the table; returns the exit status."""
    config = parse_arguments(FaultsConfig, "python -m profiling.faults", "Disturb aime_fast in every way that ought to be harmless.", argv)
    began = time.monotonic()
    torch.set_num_threads(1)
    if unknown := set(config.kinds) - set(KINDS):
        print(f"error: --kinds {' '.join(sorted(unknown))}: choose of {', '.join(KINDS)}", file=sys.stderr)
        return 2
    head = describe("cpu")
    print(f"{title(torch.device('cpu'))}, commit {head['git_commit']}", flush=True)
    site = Site(Path(tempfile.mkdtemp(prefix="aime_fast_faults_")), config.seed)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _stop)
    try:
        import_all()
        prepare(site)
        end = began + 60 * config.minutes
        lanes = {fork_lane(number, config, site, end - RESERVE): number for number in range(len(LANES))}
        problems = wait_for_lanes(lanes, end - 3)
    except Problem as problem:
        problems = [f"an undisturbed command fails: {problem}"]
    except KeyboardInterrupt:  # a signal, too
        problems = ["interrupted"]
    finally:
        process.end_all()
    outcomes = list(read_outcomes(site))
    failed = [outcome for outcome in outcomes if outcome.verdict != "survived"]
    if not outcomes:
        problems.append("nothing was tried; give it more --minutes")
    if failed:
        print(f"kept: {site.folder}")
    else:
        shutil.rmtree(site.folder, ignore_errors=True)
    print(f"\n{table(outcomes)}\n\n{time.monotonic() - began:.0f} s, seed {config.seed}")
    for line in [*failed, *problems]:
        print(line)
    if config.out:
        write_json(config.out, {**head, "problems": problems, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]})
    return int(bool(failed or problems))


def import_all() -> None:
    """Import what the commands import, so that forked ones need not. Not dm_control, which opens a connection to the renderer."""
    for name in (
        "aime_fast.train", "aime_fast.collect", "aime_fast.evaluate", "aime_fast.report", "aime_fast.reporting.page",
        "aime_fast.evaluation.open_loop", "aime_fast.evaluation.lpips", "aime_fast.evaluation.tables", "torchrl.collectors", "tyro",
        "rich.progress", "matplotlib.pyplot", "imageio_ffmpeg", "yaml",
    ):  # fmt: skip
        importlib.import_module(name)
