"""Recordings of other programs, converted: the very episodes, in the alignment of this project, or one clear line and no file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from aime_fast.config import DataConfig, preset
from aime_fast.convert import main
from aime_fast.data import DMCVBDataset, make_batches
from aime_fast.data.split import held_out_shares, split_episodes
from aime_fast.errors import ConfigError, DataError
from aime_fast.training import DMCVBTrainer


def convert(source: Path, out: Path, *flags: str) -> DMCVBDataset:
    main([str(source), "--out", str(out), "--image-size", "16", "--source-frame-skip", "50", "--no-progress", *flags])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return DMCVBDataset(out, 1)


def assert_same(data: DMCVBDataset, episodes: list[dict], frames: slice, reward: bool = True) -> None:
    assert data.num_episodes == len(episodes)
    for i, episode in enumerate(episodes):
        found = data.read_episode(i)
        assert torch.equal(found["pixels"].permute(0, 2, 3, 1), torch.from_numpy(episode["pixels"][frames]))
        torch.testing.assert_close(found["action"], torch.from_numpy(episode["action"][frames]))
        if reward:
            torch.testing.assert_close(found["reward"][:, 0], torch.from_numpy(episode["reward"][frames]))


def leading(part: np.ndarray) -> np.ndarray:
    """Rows as Dreamer has them: with each picture what led to it, zeros with the first."""
    return np.concatenate([np.zeros_like(part[:1]), part[:-1]])


def write_npz(folder: Path, episodes: list[dict], **changes) -> Path:
    folder.mkdir()
    for i, e in enumerate(episodes):
        arrays = {
            "image": e["pixels"], "action": leading(e["action"]), "reward": leading(e["reward"]),
            "discount": np.ones(len(e["action"]), np.float32), "is_first": np.arange(len(e["action"])) == 0,
        }  # fmt: skip
        arrays |= {name: change(arrays[name]) for name, change in changes.items() if change is not None}
        np.savez_compressed(folder / f"{i}.npz", **{name: part for name, part in arrays.items() if changes.get(name, 0) is not None})
    return folder


def test_npz_episodes_are_shifted_to_the_action_after_a_picture(tmp_path, episodes, capsys):
    data = convert(write_npz(tmp_path / "dreamer", episodes), tmp_path / "a.h5")
    assert_same(data, episodes, slice(0, -1))  # after the last picture no action is known
    assert {data.attributes[name] for name in ("source_format", "task")} == {"npz", "dreamer"}
    assert "3 episodes of 19 to 19 frames, 57 in all, 1 actions" in capsys.readouterr().out
    assert_same(convert(tmp_path / "dreamer", tmp_path / "b.h5", "--action-leads", "False"), [{**e, "action": leading(e["action"]),
                "reward": leading(e["reward"])} for e in episodes], slice(None))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"action": None}, "which is action"),
        ({"image": lambda x: x[..., 0]}, r"pixels are uint8 \[20, 16, 16\], expected uint8"),
        ({"image": lambda x: x / 255}, "pixels are float64"),
        ({"action": lambda x: x[:7]}, "7 actions for 20 pictures, expected as many, or one less"),
        ({"action": lambda x: np.full_like(x, np.nan)}, "action 0 of row 0 is nan"),
        ({"is_first": lambda x: x | (np.arange(len(x)) == 9)}, r"is_first at rows \[0, 9\], expected one episode a file"),
    ],
)
def test_what_is_no_episode_is_one_line_and_leaves_nothing(tmp_path, episodes, changes, says):
    source = write_npz(tmp_path / "source", episodes, **changes)
    with pytest.raises(DataError, match=says):
        convert(source, tmp_path / "a.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_damaged_file_costs_the_others_nothing(tmp_path, episodes, workers):
    """A conversion that ends half-way goes on from the episodes that it wrote, and ends in the same file."""
    source, out = write_npz(tmp_path / "source", episodes), tmp_path / "a.h5"
    whole = (source / "1.npz").read_bytes()
    for damaged, flag in ((whole[: len(whole) // 2], "--no-resume"), (whole[:200] + b"\0" * 60 + whole[260:], "--resume")):
        (source / "1.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"1.npz: cannot be read \(.*\); copy it again, .*; 1 episodes are in .*go on with --resume"):
            convert(source, out, "--workers", workers, flag)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5.unfinished", "source"]
    with pytest.raises(DataError, match=r"an earlier conversion left episodes in .*; pass --resume to keep them, or --overwrite"):
        convert(source, out)
    with pytest.raises(DataError, match=r"attribute 'conversion' is .*; resume with the same flags"):
        convert(source, out, "--resume", "--shortest", "2")
    (source / "1.npz").write_bytes(whole)
    (source / "0.npz").write_bytes((source / "2.npz").read_bytes())  # it was converted and is not read for its content again
    resumed = convert(source, out, "--resume", "--workers", workers)
    assert_same(resumed, episodes, slice(0, -1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "a.png", "source"]


def test_rows_joined_to_longer_steps(tmp_path, episodes, capsys):
    source = write_npz(tmp_path / "source", episodes, is_first=lambda x: x, discount=lambda x: 1.0 * (np.arange(len(x)) < len(x) - 1))
    data = convert(source, tmp_path / "a.h5", "--frame-skip", "3")
    assert data.attributes["frame_skip"] == 150
    first, episode = data.read_episode(0), {name: part[:-1] for name, part in episodes[0].items()}
    assert torch.equal(first["pixels"].permute(0, 2, 3, 1), torch.from_numpy(episode["pixels"][::3]))
    torch.testing.assert_close(first["action"], torch.from_numpy(episode["action"][::3]))
    sums = torch.stack([part.sum() for part in torch.from_numpy(episode["reward"]).split(3)])
    torch.testing.assert_close(first["reward"][:, 0], sums)
    assert first["discount"][:, 0].tolist() == [1.0] * 6 + [0.0]  # the task ended within the last, shorter step
    assert "the first action of 3 stands for all; they differ by up to 1." in capsys.readouterr().out
    joined = convert(source, tmp_path / "b.h5", "--frame-skip", "3", "--skipped-actions", "concatenate").read_episode(0)["action"]
    padded = np.concatenate([episode["action"], episode["action"][-1:], episode["action"][-1:]])
    torch.testing.assert_close(joined, torch.from_numpy(padded.reshape(7, 3)))


def test_the_range_of_actions_is_found_and_kept(tmp_path, episodes):
    recorded = [{**e, "action": np.concatenate([4 * e["action"] + 7, np.full_like(e["action"], 3)], 1)} for e in episodes]
    source = write_npz(tmp_path / "source", recorded)
    data = convert(source, tmp_path / "a.h5", "--find-action-range")
    low, high = (torch.tensor(data.attributes[name]) for name in ("action_low", "action_high"))
    found = torch.cat([data.read_episode(i)["action"] for i in range(3)])
    assert (found[:, 0].min().item(), found[:, 0].max().item()) == (-1.0, 1.0)
    assert (found[:, 1] == 0).all()
    back = low + (found + 1) * (high - low) / 2
    torch.testing.assert_close(back, torch.cat([torch.from_numpy(e["action"][:-1]) for e in recorded]))


def test_short_episodes_and_the_kept_split(tmp_path, episodes, capsys):
    source = write_npz(tmp_path / "source", [*episodes, {name: part[:5] for name, part in episodes[0].items()}])
    data = convert(source, tmp_path / "a.h5", "--shortest", "10", "--split", "train:34%")
    assert_same(data, episodes, slice(0, -1))
    assert "1 episodes are left out, shorter than --shortest 10 frames" in capsys.readouterr().out
    settings = DataConfig(domain="converted", task="source", frame_skip=50, image_size=16, render_quality="full", sequence_length=5)
    (batches,) = make_batches(dataclasses.replace(settings, data=str(tmp_path / "a.h5")), 0, "cpu", parts=("validation",))
    assert batches.split == split_episodes(data.identities, 0.33, 0.33, 0)
    batches.close()
    assert held_out_shares(settings, data.attributes) == (0.33, 0.33)
    assert held_out_shares(dataclasses.replace(settings, test_fraction=0.2), data.attributes) == (0.1, 0.2)
    with pytest.raises(DataError, match="all 4 episodes are shorter than --shortest 100"):
        convert(source, tmp_path / "b.h5", "--shortest", "100")


def test_what_cannot_be_converted(tmp_path, episodes):
    source = write_npz(tmp_path / "source", episodes)
    (source / "x.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"files of npz and videos; say which with --format npz\|hdf5\|videos"):
        convert(source, tmp_path / "b.h5")
    for flags, says in (
        (("--map", "pixels"), "--map pixels: expected WHAT=NAME"), (("--format", "tar"), "--format tar: expected auto, npz"),
        (("--action-range", "1", "-1"), "--action-range 1 -1: expected the lower number first"),
        (("--action-range", "0", "1", "--find-action-range"), "--action-range 0 1 --find-action-range: pass one of them"),
        (("--split", "95%"), r"--split 95%: expected train:SHARE% with a share between 0 and 100"),
        (("--split", "train:100%"), r"--split train:100%: expected train:SHARE%"),
        (("--shortest", "0"), "--shortest 0: expected at least 1"),
        (("--resume", "--overwrite"), "--resume --overwrite: the one keeps episodes"), (("--workers", "0"), "--workers 0: "),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            convert(source, tmp_path / "b.h5", "--format", "npz", "--max-episodes", "1", *flags)
    with pytest.raises(DataError, match="nowhere: there is no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "b.h5")


@pytest.mark.parametrize("rewards", [True, False])
def test_a_model_trains_on_it(tmp_path, episodes, rewards, capsys):
    changes = {} if rewards else {"reward": None}
    data = convert(write_npz(tmp_path / "mine", episodes, **changes), tmp_path / "a.h5", "--image-size", "32")
    config = preset("debug")
    settings = dict(data=str(tmp_path / "a.h5"), domain="converted", task="mine", frame_skip=50, render_quality="full")
    run = dataclasses.replace(config.run, steps=1, run_dir=str(tmp_path / "run"))
    optim = dataclasses.replace(config.optim, latent_phase_updates=0)
    result = DMCVBTrainer(dataclasses.replace(config, data=dataclasses.replace(config.data, **settings), run=run, optim=optim)).train()
    assert result["step"] == 1
    assert data.image_size == 32
    assert ("no rewards were recorded, so the heads of reward and continuation are not trained" in capsys.readouterr().out) != rewards


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert DMCVBDataset("mine.h5", 50).num_episodes == 3
