"""RLDS as TensorFlow Datasets wrote it (samples/rlds/make_rlds.py), converted: the very episodes, or one clear line and no file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aime_fast.convert import main
from aime_fast.data import DMCVBDataset
from aime_fast.data.foreign import tfrecord
from aime_fast.errors import ConfigError, DataError

SAMPLES = Path(__file__).parent / "samples" / "rlds"
FIRST, SECOND = (f"cheetah_png-train.tfrecord-0000{i}-of-00002" for i in range(2))
RAW = "cheetah_raw-train.tfrecord-00000-of-00001"


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, torch.Tensor]]:
    """Rows of real episodes; what the samples hold in their last row is no part of the episode."""
    with np.load(SAMPLES / "episodes.npz") as file:
        return [{key: torch.from_numpy(file[f"{key}_{i}"])[:-1] for key in ("pixels", "action", "reward")} for i in range(3)]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Copies a sample data set, or two, to a folder; returns it."""

    def write(name: str = "png", to: str = "source") -> Path:
        return Path(shutil.copytree(SAMPLES / name, tmp_path / to))

    return write


def convert(source: Path, out: Path, *flags: str) -> DMCVBDataset:
    main([str(source), "--out", str(out), "--image-size", "16", "--no-progress", *flags])
    return DMCVBDataset(out, 1)


def refused(source: Path, says: str, *flags: str) -> None:
    """One line, and no file under the final name."""
    out = source.with_name("refused.h5")
    with pytest.raises(DataError, match=says) as error:
        convert(source, out, "--overwrite", *flags)
    assert "\n" not in str(error.value)
    assert not out.exists()


def assert_same(data: DMCVBDataset, episodes: list[dict[str, torch.Tensor]]) -> None:
    assert data.num_episodes == len(episodes)
    for i, episode in enumerate(episodes):
        found = data.read_episode(i)
        assert torch.equal(found["pixels"].permute(0, 2, 3, 1), episode["pixels"])
        assert torch.equal(found["action"], episode["action"])
        assert torch.equal(found["reward"][:, 0], episode["reward"])


def change(path: Path, what: Callable[[dict], None]) -> None:
    """Change the columns of `features.json`, or `dataset_info.json`."""
    content = json.loads(path.read_text())
    what(content if path.name == "dataset_info.json" else columns_of(content))
    path.write_text(json.dumps(content))


def columns_of(features: dict) -> dict:
    return features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def test_shards_of_png(tmp_path, recorded):
    """All splits, by name: test comes first. The second episode of train ended in a terminal state."""
    data = convert(SAMPLES / "png", tmp_path / "a.h5")
    assert_same(data, [recorded[2], *recorded[:2]])
    assert (data.attributes["source_format"], data.attributes["task"]) == ("rlds", "png")
    discounts = [data.read_episode(i)["discount"][:, 0].tolist() for i in range(3)]
    assert discounts == [[1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0]]
    assert_same(convert(SAMPLES / "png" / SECOND, tmp_path / "b.h5"), [recorded[1]])


def test_another_camera(tmp_path, copy, recorded):
    data = convert(SAMPLES / "png", tmp_path / "a.h5", "--map", "pixels=observation/walker/egocentric_camera")
    assert_same(data, [{**e, "pixels": e["pixels"].flip(2)} for e in (recorded[2], *recorded[:2])])
    refused(copy(), "--map pixels=top: there are .*observation/walker/egocentric_camera", "--map", "pixels=top")


@pytest.mark.parametrize("pixels", ["pixels", "packed"])
def test_raw_tensors_and_rewards_beside_their_pictures(tmp_path, recorded, pixels):
    flags = ("--map", f"pixels=observation/{pixels}")
    assert_same(convert(SAMPLES / "raw", tmp_path / "a.h5", *flags, "reward=next/reward"), [recorded[0]])
    as_said = convert(SAMPLES / "raw", tmp_path / "b.h5", *flags, "reward=reward").read_episode(0)["reward"][:, 0]
    assert as_said.tolist() == [0.0, *recorded[0]["reward"][:-1].tolist()]
    position = convert(SAMPLES / "raw", tmp_path / "c.h5", *flags, "reward=reward", "action=observation/position").read_episode(0)["action"]
    torch.testing.assert_close(position, torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.2, 0.0]]))


def test_rewards_that_seem_misplaced_are_asked_about(copy):
    refused(
        copy("raw"), f"{RAW}: record 0: the first reward is 0, that of the last step 0.9.*--map reward=next/reward, .*--map reward=reward"
    )


def test_actions_that_led_to_their_pictures(tmp_path, recorded):
    """All move up by one row; the terminal picture is that after the last action."""
    data = convert(SAMPLES / "png" / SECOND, tmp_path / "a.h5", "--action-leads", "True", "--action-range", "-9", "9").read_episode(0)
    assert torch.equal(data["pixels"].permute(0, 2, 3, 1), recorded[1]["pixels"])
    torch.testing.assert_close(data["action"], torch.cat([recorded[1]["action"][1:] / 9, torch.ones(1, 6)]))
    assert data["discount"][:, 0].tolist() == [1.0, 0.0]
    with pytest.raises(
        ConfigError, match="--map reward=next/reward: next/ is for action, reward, discount and excludes --action-leads True"
    ):
        convert(SAMPLES / "png", tmp_path / "b.h5", "--action-leads", "True", "--map", "reward=next/reward")


def test_folders_of_several_data_sets(tmp_path, copy, recorded):
    train = [recorded[2], *recorded[:2]]
    copy(to="all/expert/none"), copy(to="all/medium/none")
    assert_same(convert(tmp_path / "all", tmp_path / "a.h5"), [*train, *train])
    copy("raw", to="all/raw")
    change(tmp_path / "all" / "raw" / "features.json", lambda columns: columns["action"]["tensor"]["shape"].update(dimensions=["2"]))
    refused(tmp_path / "all", r"all/raw: .*action float32 \[2\].*, in .*expert/none .*action float32 \[6\].*; convert them apart")
    copy(to="more/1.0.0"), copy(to="more/1.1.0")
    refused(tmp_path / "more", "more: versions 1.0.0 and 1.1.0 of one data set; give the folder of one of them")
    assert_same(convert(tmp_path / "more" / "1.1.0", tmp_path / "b.h5"), train)


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (0, "record 0: the checksum of its length is wrong"),
        (9, "record 0: the checksum of its length is wrong"),
        (100, r"record 0: the checksum of its \d+ bytes is wrong"),
        (-1, r"record 0: the checksum of its \d+ bytes is wrong"),
    ],
)
def test_a_flipped_bit(copy, at, says):
    source = copy()
    flip(source / SECOND, at)
    refused(
        source, f"{SECOND}: {says}; copy the file again, or leave it out; 2 episodes are in .*refused.h5.unfinished, go on with --resume"
    )


@pytest.mark.parametrize("left", [5, 11, 13, 800, -1])
def test_a_shard_cut_short(copy, left):
    source = copy()
    (source / FIRST).write_bytes((source / FIRST).read_bytes()[:left])
    refused(source, rf"{FIRST}: record 0: \d+ bytes, the file has \d+ of them, so it is cut short; copy it again")


def test_shards_and_records_that_are_missing(copy):
    source = copy()
    (source / FIRST).write_bytes(b"")
    refused(source, f"{FIRST}: 0 records, dataset_info.json says 1; copy it again")
    (source / FIRST).unlink()
    refused(source, f"{FIRST}: missing, {SECOND} is there; copy it, or convert the shards one by one")


def test_what_is_no_example(copy):
    """Checksums are right: the file is no data set of TFDS."""
    source = copy("raw")
    parts = len(b"something else").to_bytes(8, "little"), b"something else"
    (source / RAW).write_bytes(b"".join(part + tfrecord._masked(part) for part in parts))
    refused(source, rf"{RAW}: record 0: cannot be read \(.*\); copy it again")


def test_checksums_are_those_of_the_published_vectors():
    """CRC-32C of 32 zero bytes is 8a9136aa (RFC 3720, B.4), before TFRecord's mask."""
    masked = ((0x8A9136AA >> 15 | 0x8A9136AA << 17) + 0xA282EAD8) % 2**32
    assert tfrecord._masked(bytes(32)) == masked.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("name", "alter", "says"),
    [
        ("png", lambda c: c.pop("action"), r"features.json: which is action\? there are .*is_last.*--map action=NAME"),
        ("png", lambda c: c.pop("is_last"), "features.json: which column marks the last step.*--map last=NAME"),
        ("png", lambda c: c["observation"]["featuresDict"]["features"].pop("pixels"), r"which is pixels\?.*observation/walker"),
        ("png", lambda c: c.update(discount=c["reward"], is_terminal=c["reward"]) or c.pop("is_terminal"), "steps/discount is missing"),
        ("png", lambda c: shape(c, "pixels", 8), r"steps/observation/pixels: step 0 has shape \[16, 16, 3\], expected \[8, 16, 3\]"),
        ("raw", lambda c: shape(c, "pixels", 8), r"/pixels: 3072 numbers, .* says 1536 numbers, 4 steps of uint8 \[8, 16, 3\]"),
        ("raw", lambda c: shape(c, "pixels", 24), r"/pixels: 3072 numbers, .* says 4608 numbers"),
        ("png", lambda c: c["action"]["tensor"]["shape"].update(dimensions=["5"]), "steps/action: 18 numbers, .* says 15 numbers, 3 steps"),
        ("png", lambda c: c.update(action=observation(c)["pixels"]), "steps/action: 18 numbers, features.json says 3 byte strings"),
        ("png", lambda c: observation(c).update(pixels=c["reward"]), "pixels: 3 byte strings, features.json says 3 numbers"),
        ("png", lambda c: c.clear(), r"which is pixels\? there are ;"),
    ],
)  # fmt: skip
def test_what_features_json_says_otherwise(copy, name, alter, says):
    source = copy(name)
    change(source / "features.json", alter)
    refused(source, says)


def observation(columns: dict) -> dict:
    return columns["observation"]["featuresDict"]["features"]


def shape(columns: dict, camera: str, height: int) -> None:
    (content,) = (part for key, part in observation(columns)[camera].items() if key in ("image", "tensor"))
    content["shape"]["dimensions"][0] = str(height)


@pytest.mark.parametrize("flags", [("--format", "rlds"), ()])
def test_without_features_json(copy, flags):
    source = copy()
    (source / "features.json").write_text((source / "features.json").read_text()[:900])
    refused(source, r"features.json: cannot be read \(.*\); copy it again", *flags)
    (source / "features.json").write_text('{"type": "FeaturesDict"}')
    refused(source, "features.json: no 'featuresDict' in it, expected the features of RLDS steps as TFDS writes them", *flags)
    (source / "features.json").unlink()
    refused(source, "features.json: missing; it says what is in the shards, copy it beside them", *flags)
    (source / "dataset_info.json").write_text("{")
    shutil.copy(SAMPLES / "png" / "features.json", source)
    refused(source, r"dataset_info.json: cannot be read \(.*\); copy it again", *flags)


def test_without_dataset_info_the_records_that_are_there_are_read(tmp_path, copy, recorded):
    source = copy()
    (source / "dataset_info.json").unlink()
    (source / f"{FIRST}.index").write_text("0 4140")
    assert_same(convert(source, tmp_path / "a.h5"), [recorded[2], *recorded[:2]])


def test_flags_within_an_episode(copy):
    """is_first taken for is_last: row 0 is marked, and two more follow."""
    refused(
        copy(), r"tfrecord-00000-of-00001: record 0: is_first at rows \[0\] of 3, expected one episode a record", "--map", "last=is_first"
    )


def test_no_shards(tmp_path):
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", r"source: no \*\.tfrecord\* in it; give the folder that holds features.json", "--format", "rlds")
