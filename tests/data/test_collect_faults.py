"""What ends a collection early: diverging simulations, killed processes, paths that are no file. Finished episodes are kept."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from aime_fast.collect import main
from aime_fast.config import DataConfig
from aime_fast.data import DMCVBDataset, collect
from aime_fast.data.environments import RenderedTask
from aime_fast.errors import DataError

SMALL = DataConfig(image_size=16, frame_skip=50, episodes=4, workers=1)


def diverge_at(monkeypatch, episodes, spoil):
    """In these episodes (counted from 1) call `spoil(task)` before the sixth step."""
    real_step, real_reset, count = RenderedTask.step, RenderedTask.reset, {"episode": 0, "step": 0}

    def reset(task):
        count.update(episode=count["episode"] + 1, step=0)
        return real_reset(task)

    def step(task, action):
        count["step"] += 1
        if count["episode"] in episodes and count["step"] == 6:
            spoil(task)
        return real_step(task, action)

    monkeypatch.setattr(RenderedTask, "reset", reset)
    monkeypatch.setattr(RenderedTask, "step", step)


def explode(task):
    task._env.physics.data.qvel[:] = 1e300


def lose_the_state(task):
    task._env.physics.data.qpos[:] = np.nan


def lose_the_reward(task):
    task._env.task.get_reward = lambda physics: float("nan") if task._env.physics.time() > 0.5 else 0.0


@pytest.mark.parametrize("spoil", [explode, lose_the_state])
def test_a_diverging_simulation_ends_its_episode_and_another_is_played(tmp_path, monkeypatch, capfd, spoil):
    diverge_at(monkeypatch, (2, 3), spoil)
    data = DMCVBDataset(collect(SMALL, 0, tmp_path / "a.h5", progress=False), 1)
    assert data.lengths == [20] * 4
    assert data.attributes["diverged_episodes"] == 2
    assert "the simulation diverged in 2 episodes; they were played anew" in capfd.readouterr().err
    assert all(data.read_episode(i)["pixels"].float().std() > 0 for i in range(4))
    assert [each.name for each in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("spoil", [explode, lose_the_reward])
def test_a_simulation_that_always_diverges_is_given_up(tmp_path, monkeypatch, spoil):
    diverge_at(monkeypatch, range(1000), spoil)
    with pytest.raises(DataError, match="the simulation diverged in 20 episodes in a row; choose another"):
        collect(SMALL, 0, tmp_path / "a.h5", progress=False)
    assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    """Living processes that descend from `pid`."""
    parents = {}
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                state, parent = (each / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(each.name)] = int(parent)
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def alive(pid: int) -> bool:
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z"
    except OSError:
        return False


MANY = ("--tier", "debug", "--image-size", "16", "--frame-skip", "20", "--workers", "2", "--out", "a.h5", "--no-progress")


@pytest.mark.parametrize(("victim", "number", "status"), [("worker", 9, 2), ("main", 9, -9), ("main", 15, 143)])
def test_after_a_kill_finished_episodes_stay_and_resume_adds_the_others(tmp_path, monkeypatch, victim, number, status):
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "aime_fast.collect", *MANY, "--episodes", "5000"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE, text=True)
    folder, deadline = tmp_path / "a.h5.unfinished", time.monotonic() + 180
    while len(list(folder.glob("*.h5"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    family = children(process.pid)
    workers = [pid for pid in family if "multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(workers[1] if victim == "worker" else process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    if status > 0:
        lines = [line for line in errors.splitlines() if line.startswith(("error:", "interrupted by SIGTERM:"))]
        assert len(lines) == 1, errors
        assert "a.h5.unfinished" in lines[0]
        assert "--resume" in lines[0]
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, family)), "orphans"

    assert not (tmp_path / "a.h5").exists()
    kept = {}
    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            kept[path.name] = bytes(file["episode_00000"].attrs["sha256"]).decode()[:16]
    assert len(kept) >= 3
    total = len(kept) + 2
    monkeypatch.chdir(tmp_path)
    arguments = [*MANY, "--episodes", str(total), "--workers", "1"]
    if victim == "worker":
        with pytest.raises(DataError, match="pass --resume to keep them, or --overwrite"):
            main(arguments)
        with pytest.raises(DataError, match="expected swing; resume with the same --policy"):
            main([*arguments, "--resume", "--policy", "swing"])
    main([*arguments, "--resume"])
    data = DMCVBDataset(tmp_path / "a.h5", 1)
    assert data.identities[: len(kept)] == list(kept.values())
    assert len(set(data.identities)) == total, "an episode was recorded twice"
    assert [each.name for each in tmp_path.iterdir()] == ["a.h5"]
    before = (tmp_path / "a.h5").read_bytes()
    main([*arguments, "--resume"])
    assert (tmp_path / "a.h5").read_bytes() == before
    with pytest.raises(DataError, match=f"it holds {total} episodes, expected {total + 1}; collect the others into a second file"):
        main([*MANY, "--resume", "--episodes", str(total + 1)])


def test_a_worker_that_is_killed_while_it_starts_is_one_line(tmp_path):
    command = [sys.executable, "-m", "aime_fast.collect", *MANY, "--episodes", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline, workers = time.monotonic() + 60, []
    while not workers and time.monotonic() < deadline:
        time.sleep(0.01)  # the cores are for the workers
        for pid in children(process.pid):
            with contextlib.suppress(OSError):
                workers += [pid] * ("multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_text())
    try:
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2, errors
    assert "a worker process ended while it started" in errors
    assert "Traceback" not in errors


def test_a_damaged_episode_is_recorded_again(tmp_path, monkeypatch):
    diverge_at(monkeypatch, range(4, 1000), explode)
    with pytest.raises(DataError, match=r"3 of 4 episodes were recorded: they are in .*a.h5.unfinished, continue with --resume"):
        collect(SMALL, 0, tmp_path / "a.h5", progress=False)
    monkeypatch.undo()
    damaged = tmp_path / "a.h5.unfinished" / "episode_0000001.h5"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    data = DMCVBDataset(collect(SMALL, 0, tmp_path / "a.h5", progress=False, resume=True), 1)
    assert data.num_episodes == len(set(data.identities)) == 4


def test_one_file_is_recorded_by_one_process(tmp_path):
    from aime_fast.data.unfinished import Unfinished

    with Unfinished(tmp_path / "a.h5", {}, resume=False), pytest.raises(DataError, match="another process is recording it; wait for it"):
        Unfinished(tmp_path / "a.h5", {}, resume=True)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to a device", "link to a folder", "links in a circle"])
def test_what_is_not_a_regular_file_is_never_replaced(tmp_path, kind):
    out = tmp_path / "out"
    {
        "folder": lambda: out.mkdir(),
        "pipe": lambda: os.mkfifo(out),
        "device": lambda: os.mknod(out, 0o20600, os.makedev(1, 3)),
        "link to a device": lambda: out.symlink_to("/dev/null"),
        "link to a folder": lambda: out.symlink_to(tmp_path),
        "links in a circle": lambda: out.symlink_to(out),
    }[kind]()
    before = out.lstat()
    for flags in ((), ("--overwrite",), ("--resume",)):
        with pytest.raises(DataError, match=f"^{out}: .*; "):
            main(["--tier", "debug", "--out", str(out), *flags])
    with pytest.raises(DataError, match=f"^{out}: .*; "):
        collect(SMALL, 0, out, progress=False)
    assert (out.lstat().st_mode, out.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_file_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.h5").symlink_to(tmp_path / "disk" / "real.h5")
    collect(SMALL, 0, tmp_path / "out.h5", progress=False)
    assert (tmp_path / "out.h5").is_symlink()
    assert [each.name for each in (tmp_path / "disk").iterdir()] == ["real.h5"]


def test_parts_of_dead_processes_are_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".a.h5.part-{dead.pid}").write_bytes(b"x")
    (tmp_path / f".a.h5.part-{os.getppid()}").write_bytes(b"x")
    (tmp_path / f".b.h5.part-{dead.pid}").write_bytes(b"x")
    collect(SMALL, 0, tmp_path / "a.h5", progress=False)
    assert sorted(each.name for each in tmp_path.iterdir()) == [f".a.h5.part-{os.getppid()}", f".b.h5.part-{dead.pid}", "a.h5"]
