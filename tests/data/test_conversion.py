"""What a conversion keeps, refuses and never replaces, whatever the format: here npz archives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aime_fast.convert import main
from aime_fast.data import DMCVBDataset
from aime_fast.errors import ConfigError, DataError, Interrupted


def write(folder: Path, **changes: np.ndarray) -> Path:
    """Six episodes of four pictures, of which each shows its number; `e1=...` changes the actions of one, `r1`, `d1` others."""
    folder.mkdir(parents=True)
    for i in range(6):
        arrays = {"image": np.full((4, 16, 16, 3), 40 * i, np.uint8), "action": np.full((4, 2), i / 10, np.float32)}
        arrays |= {"reward": np.full(4, float(i), np.float32), "discount": np.ones(4, np.float32)}
        for key, name in (("e", "action"), ("r", "reward"), ("d", "discount")):
            if (value := changes.get(f"{key}{i}")) is not None:
                arrays[name] = value
        np.savez(folder / f"{i}.npz", **arrays)
    return folder


def convert(source: Path, out: Path, *flags: str) -> DMCVBDataset:
    main([str(source), "--out", str(out), "--image-size", "16", "--action-leads", "False", "--no-progress", *flags])
    return DMCVBDataset(out, 1)


def numbers(data: DMCVBDataset) -> list[int]:
    """Which episodes are there, by their pictures."""
    return [int(data.read_episode(i)["pixels"][0, 0, 0, 0]) // 40 for i in range(data.num_episodes)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_is_left_out_between_two_attempts_is_neither_kept_twice_nor_replaced(tmp_path, workers):
    source, out = write(tmp_path / "source", e1=np.full((4, 2), 3, np.float32)), tmp_path / "a.h5"
    with pytest.raises(DataError, match=r"1.npz: action 0 of row 0 is 3, outside \[-1, 1\]"):
        convert(source, out, "--workers", workers)
    (source / "1.npz").unlink()
    assert numbers(convert(source, out, "--resume", "--workers", workers)) == [0, 2, 3, 4, 5]


def test_episodes_of_another_source_are_not_taken_over(tmp_path):
    bad = np.full((4, 2), 3, np.float32)
    out = tmp_path / "a.h5"
    for place in ("A", "B"):
        write(tmp_path / place / "none", e2=bad)
    with pytest.raises(DataError, match="go on with --resume"):
        convert(tmp_path / "A" / "none", out)
    with pytest.raises(DataError, match=r"attribute 'source' is .*A/none, expected .*B/none; resume with the same SOURCE"):
        convert(tmp_path / "B" / "none", out, "--resume")


def test_nothing_is_written_into_the_source_nor_over_a_picture_or_a_folder(tmp_path):
    source = write(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"all.h5: it lies in .*source, where it would be read as a part of it"):
        convert(source, source / "all.h5")
    for name in ("a.png", "a.npz"):
        with pytest.raises(ConfigError, match=rf"--out .*{name}: expected a file NAME.h5 or NAME.hdf5, or a folder"):
            convert(source, tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"a.png exists; pass --overwrite"):
        convert(source, tmp_path / "a.h5")
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder: the folder exists; name another, or remove it"):
        convert(source, tmp_path / "folder", "--overwrite")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r1": np.array([0, np.nan, 0, 0], np.float32)}, r"1.npz: reward of row 1 is nan, expected a finite number; mend it there"),
        ({"d1": np.full(4, 2, np.float32)}, r"1.npz: discount of row 0 is 2, expected a number in \[0, 1\]"),
        ({"e1": np.full((4, 2), np.nan, np.float32)}, "1.npz: action 0 of row 0 is nan, expected a finite number"),
        ({"e1": np.zeros((4, 3), np.float32)}, "1.npz: 3 actions, .*0.npz has 2; convert them apart"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--find-action-range",)])
def test_what_training_would_refuse_never_gets_the_final_name(tmp_path, changes, says, flags):
    good = convert(write(tmp_path / "good"), tmp_path / "a.h5")
    before = good.paths[0].read_bytes()
    with pytest.raises(DataError, match=says):
        convert(write(tmp_path / "bad", **changes), tmp_path / "a.h5", "--overwrite", *flags)
    assert good.paths[0].read_bytes() == before


def test_a_folder_of_files_is_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("aime_fast.data.unfinished.EPISODES_A_FILE", 4)
    data = convert(write(tmp_path / "source"), tmp_path / "all")
    assert [path.name for path in data.paths] == ["episodes_0000000.h5", "episodes_0000004.h5"]
    assert numbers(data) == list(range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "all.png", "source"]


def test_rounding_is_no_reason_to_refuse_and_joined_actions_have_their_range(tmp_path):
    source = write(tmp_path / "source", e0=np.full((4, 2), 1 + 5e-7, np.float32))
    assert convert(source, tmp_path / "a.h5").read_episode(0)["action"].max() == 1
    flags = ("--frame-skip", "2", "--skipped-actions", "concatenate", "--find-action-range")
    data = convert(source, tmp_path / "b.h5", *flags)
    low, high = (torch.tensor(data.attributes[name]) for name in ("action_low", "action_high"))
    assert len(low) == len(high) == data.action_dim == 4
    torch.testing.assert_close(low + (data.read_episode(3)["action"] + 1) * (high - low) / 2, torch.full((2, 4), 0.3))


def test_a_camera_is_chosen_and_kept(tmp_path, capsys):
    source = write(tmp_path / "source")
    data = convert(source, tmp_path / "a.h5", "--camera", "image")
    assert data.attributes["camera"] == "image"
    assert "--camera image" in capsys.readouterr().out
    with pytest.raises(DataError, match="there are image, action"):
        convert(source, tmp_path / "b.h5", "--camera", "top")
    with pytest.raises(ConfigError, match="--camera image --map pixels=other: pass one of them"):
        convert(source, tmp_path / "b.h5", "--camera", "image", "--map", "pixels=other")


def test_a_stopped_conversion_counts_what_is_there(tmp_path, monkeypatch):
    """Ctrl-C while two processes write: what they are at is finished, counted, and not converted again."""
    from aime_fast.data import foreign

    source, read = write(tmp_path / "source"), foreign.READERS["npz"]

    def stopped(*arguments):
        for number, episode in enumerate(read(*arguments)):
            if number == 3:
                raise KeyboardInterrupt
            yield episode

    monkeypatch.setitem(foreign.READERS, "npz", stopped)
    with pytest.raises(Interrupted) as stop:
        convert(source, tmp_path / "a.h5", "--workers", "2")
    kept = len(list((tmp_path / "a.h5.unfinished").glob("*.h5")))
    assert kept >= 1
    assert f"{kept} episodes are in" in str(stop.value)
    monkeypatch.undo()
    assert numbers(convert(source, tmp_path / "a.h5", "--resume")) == list(range(6))


def test_without_actions(tmp_path, capsys):
    data = convert(write(tmp_path / "source"), tmp_path / "a.h5", "--actions", "none")
    assert (data.action_dim, data.lengths) == (1, [4] * 6)
    assert not data.read_episode(0)["action"].any()
    assert "no actions were recorded" in capsys.readouterr().out
