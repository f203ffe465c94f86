"""A DMC-VB directory as the root of `DMCVBDataset`: converted when it is first opened, and feeding the loop of the README."""

from __future__ import annotations

import os
import shutil
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
def folder(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(SAMPLES / request.param, tmp_path / "walker"))


def test_it_is_converted_once_and_feeds_a_loop(folder, capsys):
    data = DMCVBDataset(root=folder, sequence_length=3, image_size=32)
    assert "converting it into" in capsys.readouterr().out
    (file,) = cache_folder().iterdir()
    assert data.paths == [file]
    assert DMCVBDataset(root=str(folder), sequence_length=3, image_size=32).paths == [file]
    assert capsys.readouterr().out == ""
    recorded = np.load(SAMPLES / "episodes.npz")
    assert any(np.array_equal(data.read_episode(0)["reward"][:, 0], recorded[name][:-1]) for name in recorded.files if "reward" in name)
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
