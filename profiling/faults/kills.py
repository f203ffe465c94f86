"""Kills of `train`, `report` and `evaluate` at random instants: by SIGKILL, or by a signal that asks a command to end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from profiling.faults.outcome import Outcome, Problem, attempt
from profiling.faults.process import Command
from profiling.faults.runs import (
    EVERY,
    PHASE,
    STEPS,
    Site,
    Updates,
    check_kept,
    check_nothing_left,
    check_same_run,
    check_went_on,
    check_whole,
    evaluating,
    training,
)

MOST = 6  # kills of one run
# Where a run is killed: after it has printed a text, within a share of the seconds of a whole run; and how often there.
INSTANTS = (("", 0.12, 0.2), ("training ", 0.25, 0.35), ("inferring all episodes", 0.1, 0.3), (f"latent phase {PHASE}/{PHASE}", 0.45, 0.15))
ASKING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def choose_signal(random: np.random.Generator) -> signal.Signals:
    """SIGKILL most often."""
    return signal.SIGKILL if random.random() < 0.65 else signal.Signals(int(random.choice(ASKING)))


def statuses(signum: signal.Signals) -> tuple[int, ...]:
    """How a command may end after a signal; 0 where it came too late, minus the signal's number before the command handles it."""
    return (0, -signum) if signum == signal.SIGKILL else (0, -signum, 128 + signum)


def stage(out: str) -> str:
    """What a training run was doing, by what it had printed."""
    if f"latent phase {PHASE}/{PHASE}" in out or (f"steps {STEPS} to {STEPS}" in out and "validation:" in out):
        return "its end (validation, video, report)"
    if "inferring all episodes" in out:
        return "latent phase"
    return "joint updates" if "training " in out else "start-up"


def printed_updates(out: str) -> Updates:
    """The last ones that a training run has printed, or those from which it went on."""
    joint = re.findall(r"^step (\d+)/|, steps (\d+) to ", out, re.MULTILINE)
    latent = re.findall(r"^latent phase (\d+)/|, then updates (\d+) to ", out, re.MULTILINE)
    return Updates(
        max((int(made or begun) for made, begun in joint), default=0),
        max((int(made) if made else int(next_one) - 1 for made, next_one in latent), default=0),
    )


def train(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """Runs that are killed, and go on, several times; in the end they must equal an undisturbed one."""
    for number in numbers:
        if time.monotonic() > until:
            return
        yield from _chain(site, number, site.random("train", number))


def choose_instants(random: np.random.Generator) -> list[tuple[str, float]]:
    """Text to wait for and share of a run to wait then, of the kills of one run, later ones later in it; start-ups anywhere."""
    chosen = sorted(random.choice(len(INSTANTS), MOST, p=[often for *_, often in INSTANTS]).tolist())
    starts = chosen.count(0)
    for place in random.integers(0, MOST, starts):
        chosen.insert(int(place), chosen.pop(0))
    return [(INSTANTS[each][0], float(random.uniform(0, INSTANTS[each][1]))) for each in chosen]


def _chain(site: Site, number: int, random: np.random.Generator) -> Iterator[Outcome]:
    folder, kept = site.empty("train"), Updates()
    for kill, (text, share) in enumerate([*choose_instants(random), ("", 0.0)]):
        command = Command("aime_fast.train", training("run", "--resume"), folder)
        if kill == MOST or not command.wait_for(text) or command.wait(share * site.seconds["train"]) is not None:
            break
        signum = choose_signal(random)
        kind = f"kill of train, {stage(command.out)}"

        def killed(command=command, signum=signum) -> str:
            nonlocal kept
            command.signal(signum, group=bool(random.random() < 0.5))
            status = command.check(*statuses(signum))
            check_went_on(command.out, kept)
            printed, before = printed_updates(command.out), kept
            kept = check_kept(folder / "run", printed, 0 if status == 128 + signum else EVERY)
            if kept < before:
                raise Problem("lost", f"the newest checkpoint had {before}, now it has {kept}")
            return f"printed: {printed}; kept: {kept}"

        outcome = attempt(kind, f"chain {number}, kill {kill}, {signum.name}", killed, command.words)
        yield outcome
        if outcome.verdict != "survived":
            return

    def finished() -> None:
        command.check(0)
        check_went_on(command.out, kept)
        check_same_run(folder / "run", site.run)

    yield attempt("resumed train, compared", f"chain {number}", finished, command.words)


def pictures(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """`report` and `evaluate` are killed; their files are whole or absent, and the same command makes them all."""
    for number in numbers:
        if time.monotonic() > until:
            return
        random = site.random("pictures", number)
        module = "report" if random.random() < 0.5 else "evaluate"
        signum = choose_signal(random)
        yield attempt(f"kill of {module}", f"number {number}, {signum.name}", lambda m=module, s=signum, r=random: _pictures(site, m, s, r))


def _pictures(site: Site, module: str, signum: signal.Signals, random: np.random.Generator) -> None:
    run = site.copy_of_run("pictures")
    if random.random() < 0.5:
        remove_results(run, module)
    words = [str(run)] if module == "report" else evaluating(run)
    command = Command(f"aime_fast.{module}", words, run.parent)
    if command.wait(random.uniform(0, site.seconds[module])) is None:
        command.signal(signum)
    command.check(*statuses(signum))
    check_whole(run)
    Command(f"aime_fast.{module}", words, run.parent).check(0)
    if module == "evaluate":
        check_same_evaluation(run, site.run)
    check_nothing_left(run)
    check_same_run(run, site.run)


def remove_results(run: Path, module: str) -> None:
    """Remove from a run what `report` or `evaluate` makes."""
    if module == "report":
        (run / "report.html").unlink()
    else:
        shutil.rmtree(run / "evaluation")


def check_same_evaluation(run: Path, reference: Path) -> None:
    """Raise Problem if the numbers of an evaluation differ."""
    found, expected = (json.loads((each / "evaluation" / "evaluation.json").read_text()) for each in (run, reference))
    differing = [name for name in expected if name not in ("seconds", "checkpoint", "commit") and found.get(name) != expected[name]]
    if differing:
        raise Problem("silent", f"evaluation.json differs in {', '.join(differing)}")


def start_up(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """New processes are killed while they import and begin."""
    for number in numbers:
        if time.monotonic() > until:
            return
        random = site.random("start-up", number)
        module = ("train", "evaluate", "report", "collect")[number % 4]
        signum = choose_signal(random)
        seconds = random.uniform(0, 6) if random.random() < 0.5 else 10 ** random.uniform(-1, 0)
        fault = f"number {number}, {signum.name} after {seconds:.2f} s"
        yield attempt(f"kill of a new process, {module}", fault, lambda m=module, n=signum, s=seconds: _start_up(site, m, n, s))


def _start_up(site: Site, module: str, signum: signal.Signals, seconds: float) -> str:
    run = site.copy_of_run("start-up")
    new = run.parent / "new"
    words = {
        "train": training(new, "--resume"),
        "evaluate": evaluating(run),
        "report": [str(run)],
        "collect": [*training(new)[:2], "--out", str(run.parent / "a.h5"), "--episodes", "1000"],
    }[module]
    command = Command(f"aime_fast.{module}", words, run.parent, new=True)
    if command.wait(seconds) is None:
        command.signal(signum)
    if command.wait() is not None and "KeyboardInterrupt" in command.err and "aime_fast" not in command.err:
        return "before Python has begun with aime_fast"
    command.check(*statuses(signum))
    check_whole(run)
    if new.exists():
        check_kept(new, printed_updates(command.out))
    check_same_run(run, site.run)
    return command.last_line()
