"""Two processes in one folder, or on one file: one of them works undisturbed, the other ends with one line, or has another file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from aime_fast.data import DMCVBDataset
from profiling.faults.kills import check_same_evaluation
from profiling.faults.outcome import Outcome, Problem, attempt
from profiling.faults.process import Command
from profiling.faults.recordings import EPISODES, check_collected
from profiling.faults.runs import STEPS, Site, check_nothing_left, check_same_run, check_whole, collecting, evaluating, training


def folders(site: Site, numbers: Iterable[int], until: float) -> Iterator[Outcome]:
    """Each case in turn, at random instants."""
    cases = [each for each in CASES if site.data is not None or each not in NEED_RENDERING]
    for number in numbers:
        if time.monotonic() > until:
            return
        name = cases[number % len(cases)]
        yield attempt(f"two processes, {name}", f"number {number}", lambda n=name, i=number: CASES[n](site, site.random("folders", i)))


def _train_twice(site: Site, random: np.random.Generator) -> str:
    folder = site.empty("folders")
    first = Command("aime_fast.train", training("run", "--resume"), folder)
    first.wait_for("training ") if random.random() < 0.5 else first.wait(0)
    first.wait(random.uniform(0, site.seconds["train"] / 2))
    more = ("--resume",) if random.random() < 0.7 else ()
    second = Command("aime_fast.train", training("run", *more), folder)
    return _one_wins(site, first, second, folder)


def _train_twice_at_once(site: Site, random: np.random.Generator) -> str:
    folder = site.empty("folders")
    first, second = (Command("aime_fast.train", training("run", "--resume"), folder) for _ in range(2))
    return _one_wins(site, first, second, folder)


def _one_wins(site: Site, first: Command, second: Command, folder: Path) -> str:
    found = [each.check(0, 2) for each in (first, second)]
    check_same_run(folder / "run", site.run)
    # The first releases the folder before it writes its report; a second that resumes then has nothing left to train.
    if found == [2, 2] or (found == [0, 0] and f"steps {STEPS} to {STEPS}" not in first.out + second.out):
        raise Problem("lost", f"statuses {found}")
    return f"{found}: {(first if found[0] else second).last_line()}"


def _collect_twice(site: Site, random: np.random.Generator) -> str:
    folder = site.empty("folders")
    words = collecting("a.h5", EPISODES, 1, *(("--resume",) if random.random() < 0.5 else ()))
    first = Command("aime_fast.collect", words, folder)
    if random.random() < 0.7:
        first.wait(random.uniform(0, site.seconds["collect"]))
    second = Command("aime_fast.collect", words, folder)
    found = [each.check(0, 2) for each in (first, second)]
    check_collected(folder, [])
    if found == [2, 2] or (found == [0, 0] and "--resume" not in words):
        raise Problem("lost", f"statuses {found}")
    return f"{found}: {(first if found[0] else second).last_line()}"


def _train_twice_collecting(site: Site, random: np.random.Generator) -> str:
    folder = site.empty("folders")
    words = [each for each in training("x") if each not in ("--data", "synthetic")]
    words += ["--frame-skip", "20", "--steps", "2", "--latent-phase-updates", "0", "--workers", "1"]
    first, second = (Command("aime_fast.train", [*words, "--run-dir", name], folder) for name in ("one", "two"))
    found = [each.check(0, 2) for each in (first, second)]
    data = list((folder / "data").iterdir())
    if sorted(found) == [2, 2] or len(data) != 1 or DMCVBDataset(data[0], 1).num_episodes != 3:
        raise Problem("lost", f"statuses {found}, data {[each.name for each in data]}; {first.last_line()}")
    again = [each for each in ("one", "two") if not (folder / each / "report.html").exists()]
    for name in again:
        Command("aime_fast.train", [*words, "--run-dir", name], folder).check(0)
    return f"{found}: {(first if found[0] else second).last_line()}"


def _look_while_training(site: Site, random: np.random.Generator) -> str:
    folder = site.empty("folders")
    module = "report" if random.random() < 0.5 else "evaluate"
    train = Command("aime_fast.train", training("run", "--keep-checkpoints", "1"), folder)
    train.wait(random.uniform(0, site.seconds["train"]))
    words = ["run"] if module == "report" else evaluating(Path("run"))
    said = []
    while True:
        over = train.wait(0) is not None
        look = Command(f"aime_fast.{module}", words, folder)
        status = look.check(0, 2)
        said.append(f"{module} {status}: {look.last_line()}")
        if status == 2 and not any(text in look.err for text in ("no run here", "no checkpoint", "neither a run's folder")):
            raise Problem("lost", f"refused while training: {look.last_line()}")
        check_whole(folder / "run")
        if over:
            break
    train.check(0)
    check_same_run(folder / "run", site.run)
    return "; ".join(said)


def _look_twice(site: Site, random: np.random.Generator) -> str:
    run = site.copy_of_run("folders")
    module = "report" if random.random() < 0.5 else "evaluate"
    words = [str(run)] if module == "report" else evaluating(run)
    first = Command(f"aime_fast.{module}", words, run.parent)
    first.wait(random.uniform(0, 0.3))
    second = Command(f"aime_fast.{module}", words, run.parent)
    for each in (first, second):
        each.check(0)
    check_whole(run)
    check_nothing_left(run)
    check_same_evaluation(run, site.run)
    return json.dumps([first.last_line(), second.last_line()])


CASES: dict[str, Callable[[Site, np.random.Generator], str]] = {
    "train and train": _train_twice,
    "collect and collect": _collect_twice,
    "train and train at once": _train_twice_at_once,
    "two looks at a run": _look_twice,
    "train and train collecting": _train_twice_collecting,
    "a look while training": _look_while_training,
}
NEED_RENDERING = ("collect and collect", "train and train collecting")
