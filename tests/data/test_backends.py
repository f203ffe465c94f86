"""Collection over torch.distributed and on Ray: the episodes of a local one, and what a worker that is killed leaves."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_collect_faults import alive, children

from aime_fast.config import DataConfig
from aime_fast.data import DMCVBDataset, collect
from aime_fast.data.backends import WorkerError, _while_they_live, check_backend
from aime_fast.errors import DataError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
elsewhere = pytest.mark.parametrize("backend", ["distributed", pytest.param("ray", marks=needs_ray)])
SMALL = DataConfig(image_size=16, frame_skip=50, episodes=3, workers=2, policy="random")
TIMING = {"collection_seconds", "attributes_sha256"}


@pytest.fixture(autouse=True)
def patient_ray(monkeypatch):
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> DMCVBDataset:
    here = dataclasses.replace(SMALL, workers=1)
    return DMCVBDataset(collect(here, 4, tmp_path_factory.mktemp("local") / "a.h5", progress=False), 1)


@elsewhere
def test_a_file_does_not_tell_where_it_was_recorded(tmp_path, local, backend):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    there = DMCVBDataset(collect(SMALL, 4, tmp_path / "a.h5", progress=False, backend=backend), 1)
    assert there.identities == local.identities
    assert len(set(there.identities)) == 3
    assert there.attributes.keys() == local.attributes.keys()
    assert {key for key in there.attributes if there.attributes[key] != local.attributes[key]} <= TIMING | {"workers"}
    assert (there.attributes["workers"], local.attributes["workers"]) == (2, 1)
    assert [each.name for each in tmp_path.iterdir()] == ["a.h5"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not [pid for pid in children(os.getpid()) if "multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_text()]


@elsewhere
@pytest.mark.parametrize(("victim", "status"), [("worker", 2), ("Ctrl-C", 130)])
def test_after_a_kill_finished_episodes_stay_and_nothing_is_left_running(tmp_path, backend, victim, status):
    arguments = ["--tier", "debug", "--image-size", "16", "--frame-skip", "50", "--workers", "2", "--episodes", "5000", "--no-progress"]
    command = [sys.executable, "-m", "aime_fast.collect", *arguments, "--backend", backend, "--out", "a.h5"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run where it is ignored
    )
    folder, deadline = tmp_path / "a.h5.unfinished", time.monotonic() + 300
    try:
        while len(list(folder.glob("*.h5"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        family = children(process.pid)
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in family if alive(pid)}
        workers = [pid for pid, line in lines.items() if "multiprocessing.spawn" in line or line.startswith("ray::Collector")]
        assert len(workers) == 2, lines
        if victim == "worker":
            os.kill(workers[-1], signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith(("error:", "interrupted by SIGINT:"))]
    assert "a.h5.unfinished, continue with --resume" in line
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, family)), "orphans"
    assert len(list(folder.glob("*.h5"))) >= 3


def test_a_process_that_ends_before_it_connects_is_reported_at_once():
    gone = subprocess.Popen(["false"])
    gone.wait()

    class Process:
        exitcode = gone.returncode

    began = time.monotonic()
    with pytest.raises(WorkerError, match="a worker process ended while it started"):
        _while_they_live([Process], lambda: time.sleep(60))
    assert time.monotonic() - began < 10


def test_ray_where_it_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"^--backend ray: Ray is not installed; pip install 'aime_fast\[ray\]'"):
        collect(SMALL, 0, tmp_path / "a.h5", backend="ray")
    check_backend("distributed")
    assert list(tmp_path.iterdir()) == []


def test_another_backend_is_refused_by_the_command_line(capsys):
    from aime_fast.collect import main

    with pytest.raises(SystemExit) as refused:
        main(["--tier", "debug", "--backend", "slurm"])
    assert refused.value.code == 2
    assert "--backend" in capsys.readouterr().err
