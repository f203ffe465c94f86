"""Several processes that make one update: they come to what one process with the whole batch comes to, and end and go on together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_updates
import torch
from commands import command as run_here

from aime_fast.runtime import ranks

ROOT = Path(__file__).parents[2]
SETTINGS = [
    *("--tier", "debug", "--data", "synthetic", "--batch-size", "4", "--sequence-length", "6", "--seed", "3", "--threads", "1"),
    *("--stills", "0", "--log-every", "1", "--validate-every", "0", "--sample-every", "0", "--keep-checkpoints", "9"),
    *("--latent-phase-frames", "4", "--latent-phase-batch-size", "8"),
]
# Added to all slots alike, it cancels in their softmax: its gradient is a rounding error, which Adam makes a step of.
WITHOUT_EFFECT = "norm_slots.bias"


def command(processes: int, *arguments: str, restarts: int = 0) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts), "--nproc-per-node", str(processes)]
    launcher = launcher if processes > 1 else []
    return [sys.executable, *launcher, *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/training")))}


def run(processes: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(processes, *arguments), env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def numbers(state, prefix: str = "") -> dict[str, torch.Tensor]:
    """All numbers of nested dictionaries and lists, as float64 by name."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {name: number for key, value in items for name, number in numbers(value, f"{prefix}/{key}").items()}
    if isinstance(state, torch.Tensor | int | float):
        return {prefix: torch.as_tensor(state).double()}
    return {}


def assert_alike(a: dict, b: dict, tolerance: float) -> None:
    a, b = numbers(a), numbers(b)
    assert a.keys() == b.keys()
    differences = {name: ((a[name] - b[name]).norm() / a[name].norm().clamp_min(1e-12)).item() for name in a}
    wrong = {name: value for name, value in differences.items() if not value < tolerance and not name.endswith(WITHOUT_EFFECT)}
    assert not wrong, sorted(wrong.items(), key=lambda item: -item[1])[:5]


EVERY_KIND = """
import os, sys
from pathlib import Path
import rank_updates
from aime_fast.runtime import ranks
for number, kind in enumerate(("fp64", "fp32", "bf16")):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # they find each other anew
    ranks.traffic.messages = ranks.traffic.bytes = 0
    rank_updates.main(Path(sys.argv[1]) / kind, *(() if kind == "fp64" else (kind,)))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, list[dict]]:
    """What each of two processes has come to, in float64, in float32, and with messages of bf16."""
    folder = tmp_path_factory.mktemp("ranks")
    kinds = ("fp64", "fp32", "bf16")
    for kind in kinds:
        (folder / kind).mkdir()
    (folder / "every_kind.py").write_text(EVERY_KIND)
    done = run(2, str(folder / "every_kind.py"), str(folder))
    assert done.returncode == 0, done.stderr
    return {kind: [torch.load(folder / kind / f"{rank}.pt", weights_only=False) for rank in range(2)] for kind in kinds}


def test_updates_of_two_ranks_are_those_of_one(two_ranks, tmp_path):
    """Of all kinds, with random numbers of all kinds: weights, averages, codebooks, optimizers, RGB, metrics."""
    rank_updates.main(tmp_path)
    alone, first, second = torch.load(tmp_path / "0.pt", weights_only=False), *map(dict, two_ranks["fp64"])
    assert alone.pop("sent") == (0, 0)
    assert first.pop("sent") == second.pop("sent") > (0, 0)
    assert alone.pop("order") != first.pop("order") == second.pop("order")
    assert_alike(alone, first, 1e-10)
    first, second = numbers(first), numbers(second)
    assert all(torch.equal(first[name], second[name]) for name in first)  # to the bit, without being sent


def test_a_row_of_gradients_is_sent_while_the_next_is_made(two_ranks):
    """Of an update from two batches, each with two of single frames before: only the sums over the batches are sent."""
    stills, first, last = ["make", "send", "wait"] * 4, ["make"] * 5, ["make", "send"] * 5
    for state in (state for states in two_ranks.values() for state in states):
        assert state["order"] == ([*stills, *first, *last, "wait"], True)


def test_gradients_sent_as_bf16(two_ranks):
    """Half the bytes, the same bits in every process, and nearly the updates of fp32."""
    states = {kind: two_ranks[kind] for kind in ("fp32", "bf16")}
    first, second = map(numbers, states["bf16"])
    assert all(torch.equal(first[name], second[name]) for name in first)
    (count, size), (other_count, other_size) = (states[messages][0]["sent"] for messages in states)
    assert count == other_count
    assert 0.4 < other_size / size < 0.6
    losses, halved = ([{n: x for n, x in row.items() if n.startswith("loss/")} for row in both[0]["metrics"]] for both in states.values())
    assert losses != halved
    assert_alike(losses[:4], halved[:4], 0.01)  # of updates that have not gone apart yet


def train(folder: Path, processes: int, *flags: str) -> subprocess.CompletedProcess:
    arguments = (*SETTINGS, "--run-dir", str(folder), *flags)
    return run_here("train", *arguments, cwd=ROOT) if processes == 1 else run(processes, "-m", "aime_fast.train", *arguments)


def losses(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name.startswith(("loss/", "rgb/", "latent_phase/"))} for row in rows]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    assert train(tmp_path / "whole", 1, "--steps", "6", "--latent-phase-updates", "4").returncode == 0
    for processes, steps, phase in ((2, "2", "0"), (1, "4", "0"), (2, "6", "4")):
        done = train(tmp_path / "parts", processes, "--steps", steps, "--resume", "--latent-phase-updates", phase)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("video ") == 1  # one voice
    assert_alike(losses(tmp_path / "whole"), [row for row in losses(tmp_path / "parts") if row], 1e-3)
    facts = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert [facts["processes"], *(later["processes"] for later in facts["resumed"])] == [2, 1, 2]


def test_what_cannot_be_shared_evenly_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "of_run", lambda: ranks.Ranks(0, 3))
    done = train(tmp_path / "run", 1, "--steps", "2")
    assert done.returncode == 2
    assert "error: 3 processes cannot share evenly: --batch-size 4 (4), the decoded share of it (2)" in done.stderr
    assert not (tmp_path / "run").exists()


def end_one(started: subprocess.Popen, folder: Path, how: int) -> None:
    """Send a signal to the last of the processes as soon as there is a checkpoint."""
    until = time.monotonic() + 120
    while not list(folder.glob("checkpoint_*.pt")) and time.monotonic() < until:
        time.sleep(0.2)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    os.kill(max(int(child) for child in children), how)


ENDED = "another process of this run has ended"


def test_a_launcher_that_starts_the_processes_again_goes_on_with_the_run(tmp_path):
    folder = tmp_path / "run"
    flags = (*SETTINGS, "--run-dir", str(folder), "--steps", "20", "--checkpoint-every", "3", "--latent-phase-updates", "0")
    with open(tmp_path / "out", "w+") as out:
        started = subprocess.Popen(
            command(2, "-m", "aime_fast.train", *flags, restarts=1), env=environment(), cwd=ROOT, stdout=out, stderr=out
        )
        try:
            end_one(started, folder, signal.SIGKILL)
            until = time.monotonic() + 60
            while ENDED not in (tmp_path / "out").read_text() and time.monotonic() < until:
                time.sleep(0.2)
            said = (tmp_path / "out").read_text()
            assert ENDED in said, said  # the others learn of it within a minute
            status = started.wait(timeout=200)
        finally:
            started.kill()
        out.seek(0)
        said = out.read()
    assert status == 0, said
    begun = [line.partition("steps ")[2].partition(" ")[0] for line in said.splitlines() if line.startswith("training ")]
    assert begun[0] == "0"
    assert int(begun[1]) >= 1
    assert len(begun) == 2


def test_a_signal_to_one_process_stops_all_saved_and_the_run_goes_on_in_one(tmp_path):
    folder = tmp_path / "run"
    flags = (*SETTINGS, "--run-dir", str(folder), "--steps", "100000", "--checkpoint-every", "2", "--latent-phase-updates", "0")
    with open(tmp_path / "out", "w+") as out:
        started = subprocess.Popen(command(2, "-m", "aime_fast.train", *flags), env=environment(), cwd=ROOT, stdout=out, stderr=out)
        try:
            end_one(started, folder, signal.SIGTERM)
            began = time.monotonic()
            assert started.wait(timeout=60) != 0
            assert time.monotonic() - began < 60
        finally:
            started.kill()
        out.seek(0)
        said = out.read()
    assert "interrupted by SIGTERM: stopped after step" in said, said
    saved = max(int(path.stem.removeprefix("checkpoint_")) for path in folder.glob("checkpoint_*.pt"))
    again = train(folder, 1, "--resume", "--steps", str(saved + 1), "--checkpoint-every", "2", "--latent-phase-updates", "0")
    assert again.returncode == 0, again.stderr
    assert f"steps {saved} to {saved + 1}" in again.stdout
