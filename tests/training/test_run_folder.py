"""One run a folder, names that tell runs apart, restarts by one command, and files of a run that are damaged or cannot be read."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_trainer import config_of, rows

from aime_fast import train
from aime_fast.cli import run_command
from aime_fast.config import preset
from aime_fast.errors import CheckpointError, ConfigError
from aime_fast.runtime.files import move_aside, write_text
from aime_fast.runtime.lock import FolderLock
from aime_fast.training import DMCVBTrainer, load_model
from aime_fast.training import checkpoint as ck
from aime_fast.training.settings import default_run_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run with checkpoints after steps 1 to 4."""
    folder = tmp_path_factory.mktemp("trained")
    DMCVBTrainer(config_of(folder, steps=4, checkpoint_every=1, keep_checkpoints=9, validate_every=0)).train()
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(trained, tmp_path / "run")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint_*"))


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file."""
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


# One process a folder.


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(run, resume):
    with subprocess.Popen(
        [sys.executable, "-c", f"from aime_fast.runtime.lock import FolderLock; lock = FolderLock({str(run)!r}); print(1); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        holder.stdout.readline()
        before = content(run)
        with pytest.raises(ConfigError, match=f"another run uses this folder .process {holder.pid} "):
            DMCVBTrainer(config_of(run, steps=5, resume=resume))
        assert content(run) == before
        holder.kill()
    DMCVBTrainer(config_of(run, steps=5, resume=True))  # the kernel let go


def test_a_trainer_holds_its_folder_until_the_end_of_training(tmp_path):
    trainer = DMCVBTrainer(config_of(tmp_path, steps=1))
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path)
    trainer.train()
    FolderLock(tmp_path).release()


def test_a_worker_that_outlives_a_killed_holder_does_not_hold_the_folder(tmp_path):
    lock = FolderLock(tmp_path)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, b"up")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 2)
    lock.release()
    try:
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    config = config_of(tmp_path / "runs" / "one", steps=1)
    with pytest.raises(ValueError, match=r"absent\.h5"):
        DMCVBTrainer(dataclasses.replace(config, data=dataclasses.replace(config.data, data="absent.h5")))
    assert not list(tmp_path.iterdir())


def test_default_folders_tell_settings_apart_and_ignore_what_a_resume_may_change():
    config = preset("debug")
    plain = default_run_dir(config)
    assert str(plain) == "runs/cartpole-swingup-tierdebug-seed0"

    def folder(section, **fields):
        return default_run_dir(dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)}))

    others = [folder("model", latent_dim=7), folder("model", latent_dim=8), folder("optim", learning_rate=1.0), folder("data", episodes=9)]
    assert len({plain, *others}) == 5
    assert all(str(other).startswith(f"{plain}-") for other in others)
    assert folder("run", steps=99, resume=True, device="cpu") == folder("optim", latent_phase_updates=9) == plain
    assert str(folder("run", seed=3)) == "runs/cartpole-swingup-tierdebug-seed3"


# One command for the first start and every restart.


@pytest.mark.parametrize("before", ["missing", "empty", "killed before its first checkpoint"])
def test_resume_without_a_checkpoint_starts_a_run(tmp_path, before, capsys):
    folder = tmp_path / "run"
    if before != "missing":
        folder.mkdir()
    if before.startswith("killed"):
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss/elbo": 9.0}\n{"step": 2, "lo')
        (folder / "run.json").write_text("{}")
        (folder / "checkpoint_00000001.pt.tmp").write_bytes(b"half")
    config = config_of(folder, steps=1, resume=True, validate_every=0)
    assert DMCVBTrainer(config).train()["step"] == 1
    assert "no checkpoint here yet; the run starts from step 0" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder) if "loss/elbo" in row] == [1]
    assert names(folder) == ["checkpoint_00000001.pt"]
    assert DMCVBTrainer(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=2))).train()["step"] == 2


def test_a_folder_whose_checkpoints_are_all_damaged_is_not_started_anew(run):
    for path in run.glob("checkpoint_*"):
        path.write_bytes(b"damaged")
    config = config_of(run, steps=5, resume=True)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        DMCVBTrainer(config)
    for path in run.glob("checkpoint_*"):
        move_aside(path)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        DMCVBTrainer(config)


# Damaged checkpoints.


def test_damaged_checkpoints_are_moved_aside_and_not_counted(run):
    for step, size in ((3, 1000), (4, 0)):
        os.truncate(run / f"checkpoint_{step:08d}.pt", size)
    config = config_of(run, steps=4, resume=True, keep_checkpoints=2, checkpoint_every=1)
    result = DMCVBTrainer(config).train()
    assert result["checkpoint"] == run / "checkpoint_00000004.pt"
    assert [name for name in names(run) if name.endswith(".pt")] == ["checkpoint_00000003.pt", "checkpoint_00000004.pt"]
    assert [name for name in names(run) if name.endswith(".damaged")] == [
        "checkpoint_00000003.pt.damaged",
        "checkpoint_00000004.pt.damaged",
    ]
    assert load_model(run)[2]["step"] == 4

    os.truncate(result["checkpoint"], 5)  # once more: the first damaged file stays as well
    DMCVBTrainer(config).train()
    assert "checkpoint_00000004.pt.damaged2" in names(run)


def test_an_evaluation_passes_over_a_damaged_checkpoint_and_moves_nothing(run):
    os.truncate(run / "checkpoint_00000004.pt", 1000)
    before = content(run)
    said = []
    assert load_model(run, report=said.append)[2]["step"] == 3
    assert "checkpoint_00000004.pt" in said[0]
    assert content(run) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), PermissionError(errno.EACCES, "Permission denied"), MemoryError()])
def test_what_cannot_be_read_now_is_not_damaged(run, monkeypatch, error):
    read = Path.read_bytes
    newest = run / "checkpoint_00000004.pt"

    def fails(path):
        if path == newest:
            raise error
        return read(path)

    before = names(run)
    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(CheckpointError, match=r"I/O error|Permission denied|too little memory") as raised:
        DMCVBTrainer(config_of(run, steps=5, resume=True))
    assert "damaged" not in str(raised.value)
    assert names(run) == before


@pytest.mark.parametrize("place", ["folder", "dangling link", "pipe"])
def test_what_is_no_file_stops_a_resume(run, place):
    newest = run / "checkpoint_00000004.pt"
    newest.unlink()
    {"folder": newest.mkdir, "dangling link": lambda: newest.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(newest)}[place]()
    with pytest.raises(CheckpointError, match=r"checkpoint_00000004\.pt: .*move it away"):
        DMCVBTrainer(config_of(run, steps=5, resume=True))


def test_another_format_says_which_and_is_not_moved(run):
    newest = run / "checkpoint_00000004.pt"
    state = torch.load(newest, weights_only=True)
    for found in (3, 99, None):
        torch.save(state | {"format": found}, newest)
        with pytest.raises(CheckpointError, match=f"format is {found}, this version reads {ck.FORMAT}; run it with the version"):
            DMCVBTrainer(config_of(run, steps=5, resume=True))
    assert newest.exists()


def missing_part(state):
    del state["optimizer"]


def missing_weight(state):
    state["ema"].pop(next(iter(state["ema"])))


def extra_weight(state):
    state["ema"]["extra"] = state["model"]["extra"] = torch.zeros(1)


def other_shape(state):
    for part in ("ema", "model"):
        name = next(iter(state[part]))
        state[part][name] = torch.zeros(3, 3, 3)


def other_field(state):
    state["config"]["model"]["depth"] = 3


def no_config(state):
    state["config"] = None


@pytest.mark.parametrize("change", [missing_part, missing_weight, extra_weight, other_shape, other_field, no_config])
def test_a_state_that_does_not_fit_is_one_line(run, change):
    newest = run / "checkpoint_00000004.pt"
    state = torch.load(newest, weights_only=True)
    change(state)
    torch.save(state, newest)
    attempts = [lambda: DMCVBTrainer(config_of(run, steps=5, resume=True))]
    if change is not missing_part:
        attempts.append(lambda: load_model(run))
    for attempt in attempts:
        with pytest.raises((CheckpointError, ConfigError)) as raised:
            attempt()
        assert "\n" not in str(raised.value)
    assert newest.exists()


def test_a_full_disk_leaves_the_earlier_checkpoints_and_names_the_file(run, monkeypatch):
    before, write = names(run), io.BufferedWriter.write
    opened = open

    class Full(io.BufferedWriter):
        def write(self, data):
            if self.tell() > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, data)

    monkeypatch.setattr(
        "builtins.open",
        lambda path, mode="r", *a, **k: Full(io.FileIO(path, "w")) if str(path).endswith(".pt.tmp") else opened(path, mode, *a, **k),
    )
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoint_00000005\.pt'"):
        DMCVBTrainer(config_of(run, steps=5, resume=True)).train()
    assert names(run) == before


# The other files of a run.


@pytest.mark.parametrize("damage", ["lost", "empty", "cut", "no object", "other types", "no text", "a folder"])
def test_damage_to_the_records_of_a_run_does_not_stop_a_resume(run, damage):
    for name in ("run.json", "config.yaml", "metrics.jsonl", "wandb_id"):
        path = run / name
        data = path.read_bytes() if path.exists() else b"abcd1234"
        path.unlink(missing_ok=True)
        if damage == "a folder":
            if name != "config.yaml":
                path.mkdir()
        elif damage != "lost":
            damaged = {"empty": b"", "cut": data[: len(data) // 2], "no object": b"[1, 2]\n", "no text": b"\xff\x00\xfe\n" * 9}
            path.write_bytes(damaged.get(damage, b'{"resumed": 5, "step": "x", "versions": 1}\n{"step": 1, "loss/elbo": "high"}\n'))
    DMCVBTrainer(config_of(run, steps=5, resume=True, validate_every=0)).train()
    facts = json.loads((run / "run.json").read_text())
    assert facts["versions"]["torch"]
    assert (run / "run.json.damaged").exists() == (damage != "lost")
    assert [row["step"] for row in rows(run) if "loss/elbo" in row][-1] == 5
    assert "steps: 5" in (run / "config.yaml").read_text()


def test_lines_that_are_no_rows_are_left_out_and_kept_beside(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "hand-edited\n\n" + '{"step": NaN}\n' + "".join(lines[1:]) + '{"step": 9, "cut')
    edited = path.read_bytes()
    DMCVBTrainer(config_of(run, steps=4, resume=True, validate_every=0)).train()
    assert "".join(lines[:4]) == "".join(path.read_text().splitlines(keepends=True)[:4])
    assert (run / "metrics.jsonl.damaged").read_bytes() == edited


@pytest.mark.parametrize("instant", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, instant):
    path = tmp_path / "run.json"
    write_text(path, "old")

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if instant != "write":
        monkeypatch.setattr(os, instant, fails)
    with pytest.raises(OSError, match=r"run\.json") if instant != "write" else pytest.raises(UnicodeEncodeError):
        write_text(path, "new" if instant != "write" else "\ud800")
    monkeypatch.undo()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text("a file"), "move it away or name another folder"),
        (link_to_itself, "circle|exists"),
        (lambda path: path.parent.joinpath("x" * 300), "shorter name"),
        (lambda path: path.parent.joinpath("file").write_text(""), "a file and not a folder"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line_and_status_2(tmp_path, make, says, monkeypatch, capsys):
    path = tmp_path / "run"
    made = make(path)
    path = made if isinstance(made, Path) else tmp_path / "file" / "run" if (tmp_path / "file").exists() else path
    monkeypatch.setattr(sys, "argv", ["train", "--tier", "debug", "--data", "synthetic", "--run-dir", str(path)])
    with pytest.raises(SystemExit) as leaving:
        run_command(train.main)
    said = capsys.readouterr().err
    assert leaving.value.code == 2, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert any(part in said for part in says.split("|"))
