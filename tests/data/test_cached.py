"""A DMC-VB directory as the root of `DMCVBDataset`: converted when it is first opened, and feeding the loop of the README."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from aime_fast.config import preset
from aime_fast.data import DMCVBDataset
from aime_fast.data.cached import cache_folder
from aime_fast.errors import DataError
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

SAMPLES = Path(__file__).parent / "samples" / "rlds"


@pytest.fixture(params=["png", "raw"])  # raw: rewards lie as in DMC-VB
def sample(request) -> str:
    return request.param


@pytest.fixture
def folder(sample, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(SAMPLES / sample, tmp_path / "walker"))


def test_it_is_converted_once_and_feeds_a_loop(folder, sample, capsys):
    data = DMCVBDataset(root=folder, sequence_length=3, image_size=32)
    assert "converting it into" in capsys.readouterr().out
    (file,) = cache_folder().iterdir()
    assert data.paths == [file]
    assert DMCVBDataset(root=str(folder), sequence_length=3, image_size=32).paths == [file]
    assert capsys.readouterr().out == ""
    brought = np.load(SAMPLES / "episodes.npz")["reward_0"]  # by the action of its row: `png` has it there, `raw` with the next picture
    reward = data.read_episode(0)["reward"][:-1, 0].numpy()
    assert np.array_equal(reward, brought[: len(reward)] if sample == "raw" else brought[1 : len(reward) + 1])  # as DMC-VB's loader
    batch = next(iter(DataLoader(data, batch_size=1, shuffle=True, collate_fn=torch.stack)))
    model = DPGMMVariationalRecurrentAutoencoder.from_config(preset("debug"), data.action_dim)
    outputs = model.forward_sequence(batch["observations"], batch["actions"])
    losses, tasks = LossAggregator().compute_losses(outputs, beta=1.0)
    assert torch.isfinite(losses["elbo"])
    torch.autograd.backward(tasks)


def test_what_has_changed_is_converted_anew_and_what_is_damaged_is_one_line(folder):
    before = DMCVBDataset(folder, 2, image_size=16).paths
    shard = next(folder.glob("*.tfrecord*"))
    os.utime(shard, (0, 0))
    assert DMCVBDataset(folder, 2, image_size=16).paths != before
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=shard.name):
        DMCVBDataset(folder, 2, image_size=16)
    (folder / "features.json").unlink()
    for path in folder.glob("*.tfrecord*"):
        path.unlink()
    with pytest.raises(DataError, match=r"the folder holds no \.h5 or \.hdf5 file"):
        DMCVBDataset(folder, 2, image_size=16)


def test_two_processes_that_open_it_at_once_convert_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(SAMPLES / "raw", tmp_path / "walker")
    command = [
        sys.executable,
        "-c",
        f"from aime_fast.data import DMCVBDataset; print(DMCVBDataset({str(folder)!r}, 2, image_size=16).paths)",
    ]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum("converting it into" in out for out, _ in said) == 1
    assert len({out.splitlines()[-1] for out, _ in said}) == 1
