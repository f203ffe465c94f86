"""The fault campaign passes on a mini scale, and every way in which a fault may not be survived can be seen by it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from profiling.faults import fields, kills, runs
from profiling.faults.outcome import Outcome, Problem, attempt, table, tally
from profiling.faults.process import isolated

ROOT = Path(__file__).parents[2]


def test_the_table_counts_verdicts_by_kind():
    outcomes = [
        Outcome("b", "1"),
        Outcome("a", "1", "lost"),
        Outcome("a", "2"),
        Outcome("b", "2", "silent"),
        Outcome("b", "3", "traceback"),
    ]
    assert tally(outcomes)["a"] == {"lost": 1, "survived": 1}
    lines = table(outcomes).splitlines()
    assert [line.replace(" ", "") for line in lines[2:]] == ["|a|2|1|1|0|0|", "|b|3|1|0|1|1|", "|all|5|2|1|1|1|"]


def test_a_problem_is_the_outcome_of_an_attempt():
    def fails():
        raise Problem("silent", "numbers\ndiffer")

    outcome = attempt("kind", "fault", fails)
    assert (outcome.verdict, outcome.seen) == ("silent", "numbers | differ")
    assert attempt("kind", "fault", lambda: "fine").verdict == "survived"
    outcome = attempt("kind", "fault", lambda: {}["a name"])  # a check that fails itself
    assert (outcome.verdict, outcome.seen) == ("lost", "KeyError: 'a name'")


def test_a_crash_and_a_hang_cost_one_number_each():
    def act(number: int) -> str:
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            time.sleep(60)
        return f"survived {number}"

    answers = dict(isolated(act, range(6), seconds=1.0))
    assert answers == {
        **{number: f"survived {number}" for number in (0, 1, 3, 5)},
        2: "traceback the process ended with status -9",
        4: "traceback hung for 1 s",
    }


def test_a_child_ends_with_the_last_answer_that_is_wanted():
    answers = isolated(lambda number: str(os.getpid()) if number == 0 else time.sleep(60), range(2))
    _, pid = next(answers)
    os.kill(int(pid), 0)
    answers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


SIGNALLED = """
import signal, sys
from pathlib import Path
from profiling.faults.process import Command

for handled in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(handled, lambda *_: sys.exit("the handler of the parent"))
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) * 10:
    command = Command("sleeper", [], Path("."))
    command.signal(signum)
    command.check(-signum, 128 + signum)
"""


def test_a_signal_at_once_ends_a_forked_command_as_one_that_imports_itself(tmp_path):
    (tmp_path / "sleeper.py").write_text("import time\n\n\ndef main():\n    time.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PHASE_LINES = """training 0.1 M parameters on cpu, steps 6 to 8
step 7/8, 100 frames/s: elbo 1
step 8/8, 100 frames/s: elbo 1
step 8: inferring all episodes, then updates 1 to 6 of recurrence and priors alone
latent phase 1/6, 1 s, held out
latent phase 2/6, 1 s, held out
latent phase 3/6, 1 s, held out
"""


def test_updates_that_were_lost_are_seen_in_both_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "read_checkpoint", lambda path: torch.load(path, weights_only=True))

    def kept(latent_phase: dict | None, interval: int) -> runs.Updates:
        torch.save({"latent_phase": latent_phase}, tmp_path / f"checkpoint_{runs.STEPS:08d}.pt")
        return runs.check_kept(tmp_path, kills.printed_updates(PHASE_LINES), interval)

    assert kills.printed_updates(PHASE_LINES) == (8, 3)
    assert kills.printed_updates("".join(PHASE_LINES.splitlines(keepends=True)[:1])) == (6, 0)
    assert kept({"progress": {"update": 1}}, 2) == (8, 1)
    assert kept({"progress": {"update": 3}}, 0) == (8, 3)
    assert kept({"progress": None}, 0) == (8, 6)
    for phase, interval in (({"progress": {"update": 2}}, 0), ({"progress": {}}, 2), (None, 2)):
        with pytest.raises(Problem, match="lost"):
            kept(phase, interval)


def test_a_run_that_goes_on_from_elsewhere_is_seen():
    runs.check_went_on(PHASE_LINES, runs.Updates(6, 0))
    runs.check_went_on("no checkpoint here yet", runs.Updates(6, 0))
    again = PHASE_LINES.replace("steps 6 to", "steps 8 to")
    for out, updates in ((PHASE_LINES, (4, 0)), (again, (8, 4)), (again, (8, 6))):
        with pytest.raises(Problem, match="went on"):
            runs.check_went_on(out, runs.Updates(*updates))


def test_extremes_are_judged_without_the_code_that_is_tested():
    found = {(each.name, each.value): each for each in fields.extremes() if isinstance(each.value, int) or np.isfinite(each.value)}
    assert found["hidden_dim", 65536].is_within
    assert not found["hidden_dim", 65537].is_within
    assert found["attention_dim", 4].is_within
    assert not found["attention_dim", 5].is_within
    assert not found["grad_clip", 0].is_within  # an open end
    assert len({each.name for each in found.values()}) > 70


@pytest.mark.parametrize("change", ["a row", "a row less", "a weight", "a part left behind", "a cut picture", "a file less"])
def test_what_differs_from_an_undisturbed_run_is_seen(tmp_path, monkeypatch, change):
    verdicts = {"a row": "silent", "a weight": "silent"}
    monkeypatch.setattr(runs, "read_checkpoint", lambda path: torch.load(path, weights_only=True))
    for name in ("one", "other"):
        run = tmp_path / name
        run.mkdir()
        torch.save({"model": {"w": torch.ones(3)}, "seconds": len(name)}, run / f"checkpoint_{runs.STEPS:08d}.pt")
        (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0, "time": len(name)}) + "\n" for i in range(3)))
        (run / "a.png").write_bytes(b"\x89PNG....IEND\xaeB`\x82")
    one, other = tmp_path / "one", tmp_path / "other"
    runs.check_same_run(one, other)
    if change.startswith("a row"):
        lines = (one / "metrics.jsonl").read_text().splitlines(keepends=True)
        (one / "metrics.jsonl").write_text("".join(lines[:2]) if "less" in change else "".join(lines).replace("1.0", "1.0000000000000002"))
    elif change == "a weight":
        torch.save({"model": {"w": torch.tensor([1, 1, 1.0000001])}}, one / f"checkpoint_{runs.STEPS:08d}.pt")
    elif change == "a part left behind":
        (one / "b.tmp").write_bytes(b"")
    elif change == "a cut picture":
        (one / "a.png").write_bytes(b"\x89PNG....IE")
    else:
        (one / "a.png").unlink()
    with pytest.raises(Problem) as found:
        runs.check_same_run(one, other)
    assert found.value.verdict == verdicts.get(change, "lost")


CAMPAIGN = """
import os, shutil, sys
os.environ["OMP_NUM_THREADS"] = "1"
import zipfile
from aime_fast import config
from profiling.faults import campaign
from profiling.faults.process import Command
from profiling.faults.runs import training

def prepare(site):  # one command instead of four, once
    if not os.path.exists("run"):
        Command("aime_fast.train", training("reference", "--steps", "1", "--latent-phase-updates", "0"), site.folder).check(0)
        shutil.copytree(site.run, "run")
    shutil.copytree("run", site.run, dirs_exist_ok=True)

campaign.prepare = prepare
words = ["--minutes", "3", "--kinds", "fields", "flips", "--most", "25", "--out"]
print(campaign.main([*words, "good.json"]), flush=True)
zipfile.ZipFile.testzip = lambda self: None
config.check = lambda config: None
print(campaign.main([*words, "bad.json"]), flush=True)
"""


def test_a_short_campaign_passes_and_without_verification_and_bounds_it_fails(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CAMPAIGN], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=380, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    good, bad = (json.loads((tmp_path / name).read_text()) for name in ("good.json", "bad.json"))

    assert good["problems"] == bad["problems"] == []
    assert {outcome["verdict"] for outcome in good["outcomes"]} == {"survived"}
    assert len(good["outcomes"]) == 3 * 25
    silent = {outcome["kind"] for outcome in bad["outcomes"] if outcome["verdict"] == "silent"}
    assert silent >= {"damage to a checkpoint", "setting in a file"}
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in ("0", "1")] == ["0", "1"]
    assert any(line.startswith("SILENT  damage to a checkpoint, number ") for line in lines)
    kept = [Path(line.removeprefix("kept: ")) for line in lines if line.startswith("kept: ")]
    assert list(tmp_path.glob("aime_fast_faults_*")) == kept  # that of the good one is gone
