"""Checkpoints are whole or absent, the newest are kept, damaged ones are passed over."""

from __future__ import annotations

import dataclasses
import os
import random
import zipfile
from pathlib import Path

import pytest
import torch

from aime_fast.config import preset, to_dict
from aime_fast.errors import CheckpointError, DamagedError
from aime_fast.training import DMCVBTrainer
from aime_fast.training import checkpoint as ck


def test_newest_are_kept_and_found_in_order_of_their_steps(tmp_path):
    for step in (5, 99_999_999, 100_000_000, 20):  # nine digits sort before eight as text
        ck.save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, keep=3)
    assert [path.name for path in ck.list_checkpoints(tmp_path)] == [
        "checkpoint_00000020.pt",
        "checkpoint_99999999.pt",
        "checkpoint_100000000.pt",
    ]
    path, state = ck.read_latest(tmp_path)
    assert path == ck.latest_checkpoint(tmp_path)
    assert state["step"] == int(state["x"]) == 100_000_000


def test_kill_before_the_rename_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    ck.save_checkpoint(tmp_path, 1, {"x": 1}, keep=3)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ck.save_checkpoint(tmp_path, 2, {"x": 2}, keep=1)
    monkeypatch.undo()
    assert ck.read_latest(tmp_path)[1]["x"] == 1
    ck.save_checkpoint(tmp_path, 3, {"x": 3}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_00000001.pt", "checkpoint_00000003.pt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_newest_falls_back_to_the_one_before(tmp_path, share):
    ck.save_checkpoint(tmp_path, 1, {"x": torch.arange(1000)}, keep=3)
    newest = ck.save_checkpoint(tmp_path, 2, {"x": torch.arange(1000)}, keep=3)
    os.truncate(newest, int(newest.stat().st_size * share))
    said = []
    path, state = ck.read_latest(tmp_path, report=said.append)
    assert (path.name, state["step"]) == ("checkpoint_00000001.pt", 1)
    assert "checkpoint_00000002.pt" in said[0]
    os.truncate(path, 10)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        ck.read_latest(tmp_path, report=said.append)


def test_nothing_to_resume_and_nothing_that_runs_code(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        ck.latest_checkpoint(tmp_path / "absent")
    torch.save({"format": ck.FORMAT, "object": Exception}, tmp_path / "checkpoint_00000001.pt")
    with pytest.raises(CheckpointError, match="checkpoint_00000001"):
        ck.read_checkpoint(tmp_path / "checkpoint_00000001.pt")


def test_resume_names_the_fields_that_differ_and_allows_the_rest():
    config = preset("debug")
    run = dataclasses.replace(config.run, steps=99, device="cpu", compile_cache="compiled", logger=("jsonl", "wandb"))
    ck.check_same_config(to_dict(config), dataclasses.replace(config, run=run))
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, latent_dim=7), run=dataclasses.replace(run, seed=5))
    with pytest.raises(CheckpointError, match=r"model\.latent_dim was 6, is now 7; run\.seed was 0, is now 5") as error:
        ck.check_same_config(to_dict(config), changed)
    control = dataclasses.replace(config.control, train_ratio=3.0)
    ck.check_same_config(to_dict(config), dataclasses.replace(config, control=control))  # nobody plays
    plays = dataclasses.replace(config, control=dataclasses.replace(config.control, online=True))
    with pytest.raises(CheckpointError, match=r"control.train_ratio was \S+, is now 3.0"):
        ck.check_same_config(to_dict(plays), dataclasses.replace(plays, control=dataclasses.replace(control, online=True)))
    assert "steps" in str(error.value).split("only these may change")[1]


@pytest.mark.parametrize("found", [None, 6, ck.FORMAT + 1])
def test_another_format_is_refused_with_both_numbers(tmp_path, found):
    path = tmp_path / "checkpoint_00000001.pt"
    torch.save({"format": found, "step": 1}, path)
    with pytest.raises(CheckpointError, match=rf"format is {found}, this version reads {ck.FORMAT}; .* start anew in another --run-dir"):
        ck.read_checkpoint(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run with checkpoints after steps 1, 2, 3 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    config = preset("debug")
    run = dataclasses.replace(config.run, run_dir=str(folder), steps=4, checkpoint_every=1, keep_checkpoints=9, validate_every=0)
    DMCVBTrainer(dataclasses.replace(config, data=dataclasses.replace(config.data, data="synthetic"), run=run)).train()
    return folder


def assert_same(first, second):
    """Equal dictionaries of tensors and values, to the bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert_same(value, second[name])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    else:
        assert first == second


def test_a_flipped_bit_is_refused_or_changes_nothing(trained, tmp_path):
    """Anywhere, in the headers between the records, and in the table of contents at the end."""
    whole = ck.latest_checkpoint(trained)
    data, expected = whole.read_bytes(), ck.read_checkpoint(whole)
    with zipfile.ZipFile(whole) as archive:
        table = archive.start_dir
        headers = [info.header_offset for info in archive.infolist()]
    draw = random.Random(0)
    places = [draw.randrange(len(data)) for _ in range(50)]
    places += [draw.choice(headers) + draw.randrange(30) for _ in range(25)]
    places += [draw.randrange(table, len(data)) for _ in range(25)] + [draw.randrange(len(data) - 22, len(data)) for _ in range(10)]
    path, refused = tmp_path / whole.name, 0
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found = ck.read_checkpoint(path)
        except DamagedError:
            refused += 1
        else:
            assert_same(found, expected)
    assert refused >= 60


@pytest.mark.parametrize("damage", ["zeros", "doubled", "swapped"])
def test_other_damage_inside_a_file_of_the_right_length_is_refused(trained, tmp_path, damage):
    """A block that was never written, one written in another's place, two exchanged."""
    whole = ck.latest_checkpoint(trained)
    data = bytearray(whole.read_bytes())
    one, other = slice(4096, 8192), slice(81920, 86016)
    if damage == "zeros":
        data[other] = bytes(4096)
    elif damage == "doubled":
        data[other] = data[one]
    else:
        data[one], data[other] = data[other], data[one]
    path = tmp_path / whole.name
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="damaged"):
        ck.read_checkpoint(path)
