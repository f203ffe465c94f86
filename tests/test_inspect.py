"""`python -m aime_fast.inspect` as a user runs it: real recordings, copies with one fault each, a real run and its checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from aime_fast.cli import run_command
from aime_fast.config import DataConfig, preset
from aime_fast.data import EpisodeWriter, collect
from aime_fast.data.episodes import DTYPES, FORMAT_VERSION, UNVERIFIED_VERSION
from aime_fast.data.faults import Pictures
from aime_fast.errors import CheckpointError, ConfigError, DataError
from aime_fast.inspect import main
from aime_fast.training import DMCVBTrainer

ROOT = Path(__file__).parents[1]
Episodes = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    """Three real episodes of 20 frames."""
    settings = DataConfig(image_size=16, frame_skip=50, episodes=3, workers=1, policy="random")
    return collect(settings, 0, tmp_path_factory.mktemp("recording") / "a.h5", progress=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A debug run of two steps, with a checkpoint after each."""
    config, folder = preset("debug"), tmp_path_factory.mktemp("trained") / "run"
    run = dataclasses.replace(
        config.run, run_dir=str(folder), steps=2, checkpoint_every=1, keep_checkpoints=9, validate_every=0, device="cpu"
    )
    data = dataclasses.replace(config.data, data="synthetic")
    DMCVBTrainer(dataclasses.replace(config, data=data, run=run)).train()
    return folder


@pytest.fixture
def rewritten(recording, tmp_path) -> Callable[..., Path]:
    """Writes the recording again, with what `change` does to its episodes, under right checksums; returns the file."""

    def write(change: Callable[[Episodes], object] = lambda episodes: None, name: str = "b.h5", **attributes: object) -> Path:
        with h5py.File(recording) as file:
            episodes = [{key: group[key][()] for key in DTYPES} for group in file.values()]
            kept = {key: value for key, value in file.attrs.items() if key not in ("attributes_sha256", "position_names")}
        change(episodes)
        with EpisodeWriter(tmp_path / name, kept | attributes) as writer:
            for episode in episodes:
                writer.write(episode)
        return tmp_path / name

    return write


def look(capsys, *arguments: object) -> dict:
    """What --json prints, whatever the status."""
    with suppress(CheckpointError, DataError):  # after it has printed
        main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def kinds(facts: dict, refused: bool | None = None) -> list[str]:
    return [fault["kind"] for fault in facts["faults"] if refused in (None, fault["refused"])]


def flip(path: Path, episode: str, key: str = "pixels", chunk: int = 0) -> None:
    """Change one bit within a stored chunk."""
    with h5py.File(path) as file:
        stored = file[episode][key].id
        place = (
            stored.get_chunk_info(chunk).byte_offset + stored.get_chunk_info(chunk).size // 2
            if file[episode][key].chunks
            else stored.get_offset()
        )
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 16
    path.write_bytes(damaged)


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "aime_fast.inspect", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


# Data.


def test_the_command_prints_a_table_and_no_fault_of_a_good_recording(recording):
    done = run(recording.parent, "a.h5", "--verify")
    assert (done.returncode, done.stderr) == (0, "")
    for text in (
        "a.h5: 3 episodes, 60 frames",
        "cartpole swingup",
        "frame skip 50",
        "policy random",
        "20 to 20 frames",
        "60 of 60 looked at",
    ):
        assert text in done.stdout, text
    assert "every byte was read: 3 verified" in done.stdout
    assert done.stdout.rstrip().endswith("no faults found")


def test_the_facts_are_those_of_the_arrays(recording, capsys):
    facts = look(capsys, recording)
    with h5py.File(recording) as file:
        episodes = list(file.values())
        action, reward = (np.concatenate([group[key][()] for group in episodes]) for key in ("action", "reward"))
        returns = [float(group["reward"][()].sum(dtype=np.float64)) for group in episodes]
        identities = [group.attrs["sha256"].decode()[:16] for group in episodes]
    assert facts["actions"][0]["mean"] == pytest.approx(action.mean(), abs=1e-6)
    assert facts["actions"][0]["std"] == pytest.approx(action.std(), abs=1e-6)
    assert (facts["rewards"]["least"], facts["rewards"]["largest"]) == (reward.min(), reward.max())
    assert [row["return"] for row in facts["episode_table"]] == pytest.approx(returns)
    assert [row["identity"] for row in facts["episode_table"]] == identities
    assert facts["bytes"] == recording.stat().st_size
    assert facts["bytes_per_frame"] == pytest.approx(recording.stat().st_size / 60)
    assert facts["storage"] == [{"codec": "deflate 1, fletcher32", "chunks": [16, 16, 16, 3]}]
    assert facts["format_version"] == FORMAT_VERSION
    assert facts["checked"] == {"not re-read": 3}
    assert facts["held_out"] is None
    assert facts["terminal_frames"] == 0
    assert facts["faults"] == []


def set_value(key: str, where: tuple | slice, value: float, episode: int = 1) -> Callable[[Episodes], None]:
    def change(episodes: Episodes) -> None:
        episodes[episode][key][where] = value

    return change


def copy_first(episodes: Episodes) -> None:
    episodes.append(episodes[0])


def shorten(episodes: Episodes) -> None:
    episodes[1] = {key: value[:4] for key, value in episodes[1].items()}


def constant_everywhere(episodes: Episodes) -> None:
    for episode in episodes:
        episode["action"] = np.concatenate([episode["action"], np.full((20, 1), 0.5, np.float32)], 1)


FAULTS = {
    "nan reward": (set_value("reward", 7, np.nan), "non-finite", True, "frame 7: reward is nan, the first of 1 such among 20"),
    "action beyond 1": (set_value("action", (3, 0), 1.5), "range", True, "frame 3: action 0 is 1.5, the first of 1 such among 20"),
    "discount": (set_value("discount", 2, -0.5), "range", True, "frame 2: discount is -0.5"),
    "is_init": (set_value("is_init", 5, True), "is_init", True, "is_init is true at frames [0, 5]"),
    "ends early": (set_value("discount", 4, 0.0), "early end", False, "frame 4: discount is 0"),
    "constant action": (set_value("action", slice(None), 0.25), "constant action", False, "action 0 is constant, at 0.25"),
    "constant reward": (set_value("reward", slice(None), 0.5), "constant reward", False, "reward is 0.5 in each frame"),
    "black": (set_value("pixels", slice(3, 6), 2), "black", False, "frame 3: the first of 3 of 20 pictures (15%) that are black, largest"),
    "one colour": (set_value("pixels", slice(18, None), 90), "plain", False, "frame 18: the first of 2 of 20 pictures (10%)"),
    "short": (shorten, "short", False, "4 frames, fewer than the usual sequence of 10"),
    "identical": (copy_first, "identical", False, "episode_00003: the same content as episode_00000 of "),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_found_named_and_the_only_one(case, rewritten, capsys):
    change, kind, refused, message = FAULTS[case]
    path = rewritten(change)
    facts = look(capsys, path, "--verify")
    (fault,) = facts["faults"]
    assert (fault["kind"], fault["refused"]) == (kind, refused)
    assert fault["message"].startswith(f"{path}: episode_0000{3 if case == 'identical' else 1}")
    assert message in fault["message"]
    assert ";" in fault["message"], "no remedy"
    assert "\n" not in fault["message"]


def test_a_frozen_camera_and_an_action_that_never_changes(rewritten, capsys):
    def freeze(episodes: Episodes) -> None:
        episodes[2]["pixels"][4:15] = episodes[2]["pixels"][4]

    (fault,) = look(capsys, rewritten(freeze), "--verify")["faults"]
    assert (fault["kind"], fault["episode"], fault["frame"], fault["value"]) == ("repeated", "episode_00002", 4, 11)
    (fault,) = look(capsys, rewritten(constant_everywhere, "c.h5", action_dim=2))["faults"]
    assert fault["kind"] == "constant action"
    assert "action 1 is 0.5 here and in each of 3 episodes" in fault["message"]


def test_stretches_of_equal_pictures_go_on_from_piece_to_piece_but_not_over_a_gap():
    frames = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    frames[2:5] = frames[2]
    whole, pieces, gap = Pictures(), Pictures(), Pictures()
    whole.look(frames, 0)
    pieces.look(frames[:3], 0)
    pieces.look(frames[3:], 3)
    gap.look(frames[:3], 0)
    gap.look(frames[3:], 30)
    assert whole.counts() == pieces.counts() == {"looked_at": 6, "black": 0, "plain": 0, "repeated": 2}
    assert (whole.longest, whole.first["repeated"]) == (3, (2, 3))
    assert (gap.repeated, gap.longest) == (1, 2)


def test_verify_lists_every_damaged_episode_of_every_shard(rewritten, tmp_path, capsys):
    first, second = rewritten(name="shards1.h5"), rewritten(name="shards2.h5")
    folder = tmp_path / "shards"
    folder.mkdir()
    first, second = (path.rename(folder / path.name) for path in (first, second))
    flip(first, "episode_00000")
    flip(first, "episode_00002", chunk=1)
    flip(second, "episode_00001")
    with h5py.File(second, "r+") as file:  # chunks that are right, of another content
        file["episode_00002/reward"][3] += 1
    facts = look(capsys, folder, "--verify")
    bad = [(Path(fault["file"]).name, fault["episode"], fault["frame"], fault["kind"]) for fault in facts["faults"] if fault["refused"]]
    assert bad == [
        ("shards1.h5", "episode_00000", 0, "unreadable"),
        ("shards1.h5", "episode_00002", 16, "unreadable"),
        ("shards2.h5", "episode_00001", 0, "unreadable"),
        ("shards2.h5", "episode_00002", None, "checksum"),
    ]
    assert facts["checked"] == {"damaged": 4, "verified": 2}
    done = run(tmp_path, "shards", "--verify")
    assert done.returncode == 2
    assert done.stderr == "error: shards: 4 faults, each named above with its remedy\n"
    assert "pixels', frames 16 to 19, is damaged" in done.stdout


def test_without_verify_a_sample_is_read_and_the_output_says_so(rewritten, tmp_path, capsys):
    def long(episodes: Episodes) -> None:
        episodes[0] = {key: np.concatenate([value] * 5) for key, value in episodes[0].items()} | {"is_init": np.arange(100) == 0}

    flip(rewritten(long), "episode_00000", chunk=6)
    main([str(tmp_path / "b.h5")])
    text = capsys.readouterr().out
    assert "72 of 140 looked at (a sample; --verify looks at all)" in text
    assert "3 not re-read; --verify reads every picture" in text
    with pytest.raises(DataError, match="1 fault, named above"):
        main([str(tmp_path / "b.h5"), "--verify"])


def test_damaged_attributes_do_not_hide_the_episodes(rewritten, capsys):
    path = rewritten(set_value("reward", 7, np.nan))
    with h5py.File(path, "r+") as file:
        file.attrs["seed"] = 99
    facts = look(capsys, path)
    assert kinds(facts, refused=True) == ["attributes", "non-finite"]
    assert facts["frames"] == 60


def test_files_of_format_1_and_stored_shares(rewritten, capsys):
    path = rewritten(validation_fraction=0.1, test_fraction=0.2)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = UNVERIFIED_VERSION
        for group in file.values():
            del group.attrs["sha256"]
    facts = look(capsys, path, "--verify")
    assert facts["checked"] == {"no checksum": 3}
    assert facts["held_out"] == {"validation_fraction": 0.1, "test_fraction": 0.2}
    assert len({row["identity"] for row in facts["episode_table"]}) == 3
    assert facts["faults"] == []


def test_shards_of_other_settings_are_a_fault(rewritten, capsys):
    names = [str(rewritten(name="b.h5")), str(rewritten(set_value("reward", 0, 0.5), name="c.h5", task="balance"))]
    fault = look(capsys, *names)["faults"][0]
    assert (fault["kind"], fault["value"], fault["refused"]) == ("settings", "balance", True)


def test_rewards_that_were_not_recorded_are_no_fault(rewritten, capsys):
    def none(episodes: Episodes) -> None:
        for episode in episodes:
            episode["reward"][:] = 0

    assert kinds(look(capsys, rewritten(none))) == ["constant reward"]
    facts = look(capsys, rewritten(none, "c.h5", rewards="none"))
    assert facts["faults"] == []
    assert facts["rewards_recorded"] is False


# Films.


def test_play_writes_a_film_of_the_episode(recording, tmp_path, capsys):
    out = tmp_path / "film.mp4"
    main([str(recording), "--play", str(out), "--episode", "2"])
    assert "film.mp4: 20 frames of episode_00002" in capsys.readouterr().out
    reader = imageio_ffmpeg.read_frames(str(out))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    assert len(frames) == 20
    with h5py.File(recording) as file:
        pixels = file["episode_00002/pixels"][()]
    factor = width // 16
    for frame, picture in zip(frames, pixels):
        seen = frame[: 16 * factor].reshape(16, factor, 16, factor, 3)[:, factor // 2, :, factor // 2]  # the middle of each enlarged pixel
        assert np.abs(seen.astype(int) - picture).mean() < 12
    text = frames[0][16 * factor :]
    assert (text > 200).any()
    assert (text < 40).mean() > 0.5
    assert not np.array_equal(text, frames[7][16 * factor :])


def test_what_play_refuses(recording, trained, tmp_path):
    with pytest.raises(ConfigError, match=r"expected the name of a film to write, ending in \.mp4"):
        main([str(recording), "--play", str(recording)])
    with pytest.raises(ConfigError, match="--episode 3: there are 3 episodes, numbered from 0 to 2"):
        main([str(recording), "--play", str(tmp_path / "a.mp4"), "--episode", "3"])
    for target, kind in ((trained, "run"), (trained / "checkpoint_00000002.pt", "checkpoint")):
        with pytest.raises(ConfigError, match=f"is a {kind}, .*`python -m aime_fast.evaluate"):
            main([str(target), "--play", str(tmp_path / "a.mp4")])
    assert not list(tmp_path.iterdir())


# Runs and checkpoints.


def test_a_run(trained, capsys):
    facts = look(capsys, trained, "--verify")
    assert (facts["kind"], facts["step"], facts["planned"], facts["online"]) == ("run", 2, {"steps": 2}, False)
    assert [(each["name"], each["checked"]) for each in facts["checkpoints"]] == [
        ("checkpoint_00000001.pt", "verified"),
        ("checkpoint_00000002.pt", "verified"),
    ]
    assert facts["resume"]["checkpoint"] == "checkpoint_00000002.pt"
    assert facts["resume"]["command"].endswith("--resume")
    assert facts["results"] == ["prediction.mp4"]
    assert facts["samples"] == 3
    assert facts["facts"]["device"] == "cpu"
    assert facts["metrics"]["validation/psnr"]["step"] == 2
    assert facts["faults"] == []
    main([str(trained)])
    text = capsys.readouterr().out
    for words in ("a run, 3 rows of metrics", "step 2 of 2 steps planned", "loss/elbo", "not re-read", "no faults found"):
        assert words in text, words


def test_damage_in_a_run_and_its_episodes(trained, recording, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    newest = folder / "checkpoint_00000002.pt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    os.truncate(folder / "checkpoint_00000001.pt", 1000)
    (folder / "run.json").write_text("{")
    (folder / "episodes").mkdir()
    for number in range(2):
        shutil.copy(recording, folder / f"episodes/episode_{number:07d}.h5")
    flip(folder / "episodes/episode_0000001.h5", "episode_00001")
    facts = look(capsys, folder)
    assert [each["checked"].split()[0] for each in facts["checkpoints"]] == ["damaged", "not"]
    assert facts["episodes"]["files"] == 2
    facts = look(capsys, folder, "--verify")
    assert [each["checked"].split()[0] for each in facts["checkpoints"]] == ["damaged", "damaged"]
    assert facts["resume"] is None
    assert kinds(facts, refused=True) == ["unreadable", "checkpoint", "checkpoint", "unreadable"]
    assert facts["episodes"]["checked"] == {"verified": 5, "damaged": 1}
    with pytest.raises(CheckpointError, match="4 faults, each named above"):
        main([str(folder), "--verify"])


def test_a_checkpoint(trained, tmp_path, capsys):
    path = trained / "checkpoint_00000002.pt"
    facts = look(capsys, path, "--verify")
    assert sum(facts["parameters"].values()) == json.loads((trained / "run.json").read_text())["parameters"]
    assert facts["parameters_counted"] == "parameters"
    assert (facts["step"], facts["dtypes"], facts["optimizer"], facts["checked"]) == (2, ["float32"], True, "verified")
    assert facts["settings"]["latent_dim"] == preset("debug").model.latent_dim
    assert facts["faults"] == []
    main([str(path)])
    assert "temporal_dynamics" in capsys.readouterr().out

    state = torch.load(path, weights_only=True)
    next(iter(state["model"].values())).view(-1)[0] = float("nan")
    for name in ("optimizer", "discriminator_optimizer"):
        del state[name]
    torch.save(state | {"format": 15}, tmp_path / "other.pt")
    facts = look(capsys, tmp_path / "other.pt")
    assert kinds(facts, refused=True) == ["non-finite"]
    assert kinds(facts, refused=False) == ["format"]
    assert facts["optimizer"] is False


# What is none of the three.


def make_npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", action=np.zeros(3))
    return folder / "a.npz"


def make_other_hdf5(folder: Path) -> Path:
    with h5py.File(folder / "other.hdf5", "w") as file:
        file["data/demo_0/actions"] = np.zeros((3, 2))
    return folder / "other.hdf5"


def make_text(folder: Path, name: str = "a.txt") -> Path:
    (folder / name).write_text("hello")
    return folder / name


REFUSED = {
    "missing": (lambda folder: folder / "none.h5", "there is no such file or folder; give an HDF5 file"),
    "empty folder": (lambda folder: folder, "the folder is empty; record episodes with"),
    "other folder": (lambda folder: make_text(folder).parent, "neither episodes (.h5) nor a run are in this folder;"),
    "npz": (make_npz, "a recording of another program (npz); convert it with `python -m aime_fast.convert "),
    "other HDF5": (make_other_hdf5, "is of another program (there is no attribute 'format_version'); convert it with"),
    "text": (make_text, "neither HDF5 nor a checkpoint (.pt);"),
    "text as HDF5": (lambda folder: make_text(folder, "a.h5"), "this is not an HDF5 file;"),
    "text as checkpoint": (lambda folder: make_text(folder, "a.pt"), "not a whole checkpoint, truncated or damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_of_the_three_is_one_line(case, tmp_path, capsys):
    make, message = REFUSED[case]
    target = make(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        run_command(lambda: main([str(target), "--verify"]))
    said = capsys.readouterr()
    assert leaving.value.code == 2
    assert said.err.startswith(f"error: {target}: ")
    assert message in said.err
    assert said.err.count("\n") == 1


def test_a_truncated_file_and_a_folder_of_runs(recording, trained, tmp_path):
    path = shutil.copy(recording, tmp_path / "a.h5")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match="truncated or damaged"):
        main([str(path)])
    with pytest.raises(DataError, match=r"it holds 1 runs; give one of them, such as .*run"):
        main([str(trained.parent)])
    with pytest.raises(ConfigError, match="several names are taken as one data set, and this is a run"):
        main([str(recording), str(trained)])


def test_the_name_of_the_file_shadows_the_standard_library_nowhere(tmp_path):
    """Only where the package's own folder is put on the search path, and then a line says so."""
    import inspect

    assert Path(inspect.__file__).parent != ROOT / "aime_fast"
    done = subprocess.run([sys.executable, ROOT / "aime_fast/inspect.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "start its commands as modules" in done.stderr
