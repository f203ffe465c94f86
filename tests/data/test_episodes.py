"""HDF5: reading returns what was written, and each kind of bad file has its own message."""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import ATTRIBUTES, random_episode, seal
from torch.utils.data import DataLoader

from aime_fast.data import DMCVBDataset, EpisodeWriter, normalise
from aime_fast.errors import DataError

CHECKED = {key: ATTRIBUTES[key] for key in ("domain", "task", "frame_skip", "image_size", "render_quality", "action_dim")} | {"camera": "0"}


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(6, 40), min_size=1, max_size=4),
    image_size=st.integers(1, 9),
    action_dim=st.integers(1, 5),
    sequence_length=st.integers(1, 6),
)
def test_round_trip(lengths, image_size, action_dim, sequence_length):
    episodes = [random_episode(n, i, image_size, action_dim) for i, n in enumerate(lengths)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.h5"
        with EpisodeWriter(path, {**ATTRIBUTES, "image_size": image_size, "action_dim": action_dim}) as writer:
            for episode in episodes:
                writer.write(episode)
        assert list(Path(folder).iterdir()) == [path]
        data = DMCVBDataset(path, sequence_length, image_size=image_size, action_dim=action_dim)
        assert data.lengths == lengths
        assert len(data) == sum(n // sequence_length for n in lengths)
        for i, episode in enumerate(episodes):
            read = data.read_episode(i)
            np.testing.assert_array_equal(read["pixels"].permute(0, 2, 3, 1), episode["pixels"])
            np.testing.assert_array_equal(read["action"], episode["action"])
            for key in ("reward", "discount", "is_init"):
                np.testing.assert_array_equal(read[key][:, 0], episode[key])
        first = data[0]
        assert {key: (value.dtype, tuple(value.shape)) for key, value in first.items()} == {
            "observations": (torch.float32, (sequence_length, 3, image_size, image_size)),
            "actions": (torch.float32, (sequence_length, action_dim)),
            "pixels": (torch.uint8, (sequence_length, 3, image_size, image_size)),
            "action": (torch.float32, (sequence_length, action_dim)),
            "reward": (torch.float32, (sequence_length, 1)),
            "discount": (torch.float32, (sequence_length, 1)),
            "is_init": (torch.bool, (sequence_length, 1)),
        }
        data.close()


def test_several_files_and_wildcards(shard, tmp_path):
    a, b = shard((20, 30), "a1.h5"), shard((25,), "b.h5")
    c = shard((40,), "a2.h5")
    lengths = lambda text: DMCVBDataset(root=text, sequence_length=10).lengths  # noqa: E731
    assert lengths(f"{tmp_path}/a*.h5") == [20, 30, 40]
    assert lengths(f"{b}, {tmp_path}/a?.h5") == [25, 20, 30, 40]
    assert lengths(str(tmp_path / "*")) == [20, 30, 40, 25]
    with pytest.raises(DataError, match=r"--data .*/z\*\.h5: no file matches; give an HDF5 file"):
        lengths(f"{a},{tmp_path}/z*.h5")
    with pytest.raises(DataError, match=r"gone\.h5: there is no such file"):
        lengths(f"{c},{tmp_path}/gone.h5")
    named = c.rename(tmp_path / "odd,[1].h5")
    assert lengths(str(named)) == [40]


def test_items_as_aime_had_them_feed_a_loader(shard):
    data = DMCVBDataset(root=shard(), sequence_length=10)
    batch = next(iter(DataLoader(data, batch_size=3, collate_fn=torch.stack, num_workers=1)))
    assert (batch["observations"].shape, batch["actions"].shape) == ((3, 10, 3, 8, 8), (3, 10, 2))
    assert torch.equal(batch["observations"], normalise(batch["pixels"]))
    assert torch.equal(batch["actions"], batch["action"])


GROWTH = """
import resource, sys
from aime_fast.data import DMCVBDataset
data = DMCVBDataset(sys.argv[1], 1)
grown = []
for i in range(300):
    data.read_episode(i % data.num_episodes)
    grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(grown[-1] - grown[20])
"""


def test_reading_many_episodes_needs_no_more_memory_than_a_few(tmp_path):
    path, attributes = tmp_path / "a.h5", {**ATTRIBUTES, "image_size": 32}
    with EpisodeWriter(path, attributes) as writer:
        for seed in range(300):  # 0.7 MiB each, of pictures that compress
            episode = random_episode(249, seed, 8)
            writer.write({**episode, "pixels": episode["pixels"].repeat(4, 1).repeat(4, 2)})
    done = subprocess.run([sys.executable, "-c", GROWTH, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60  # MiB


def test_shards_are_joined_and_survive_pickling(shard):
    a, b = shard((20, 30), "a.h5"), shard((25,), "b.h5")
    for path in (a.parent, [a, b]):
        data = pickle.loads(pickle.dumps(DMCVBDataset(path, 10, **CHECKED)))
        assert data.lengths == [20, 30, 25]
        assert torch.equal(data.read_episode(2)["pixels"][:10], data[5]["pixels"])
    batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4, collate_fn=torch.stack, num_workers=2)))
    assert batch.shape == (4, 10)


def test_positions_are_optional_and_read_only_if_all_shards_have_them(shard, tmp_path):
    episode = random_episode(20) | {"positions": np.random.default_rng(0).random((20, 3, 2), dtype=np.float32)}
    for name in ("c.h5", "d.h5"):
        with EpisodeWriter(tmp_path / name, {**ATTRIBUTES, "position_names": ["cart", "pole", "tip"]}) as writer:
            writer.write(episode)
    data = DMCVBDataset([tmp_path / "c.h5", tmp_path / "d.h5"], 10)
    assert data.position_names == data.attributes["position_names"] == ("cart", "pole", "tip")
    np.testing.assert_array_equal(data[1]["positions"], episode["positions"][10:])
    mixed = DMCVBDataset([tmp_path / "c.h5", shard((20,), "old.h5")], 10)
    assert mixed.position_names == ()
    assert all("positions" not in set(mixed[i].keys()) for i in range(len(mixed)))
    with pytest.raises(DataError, match=r"positions' has shape \[20, 3, 2\], expected float32 \[20, 0, 2\]"):  # noqa: SIM117
        with EpisodeWriter(tmp_path / "e.h5", ATTRIBUTES) as writer:
            writer.write(episode)


def test_an_exception_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"), EpisodeWriter(tmp_path / "x.h5", ATTRIBUTES) as writer:  # noqa: PT012
        writer.write(random_episode(20))
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []


def replace(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """A mutation that replaces data set `key` of the second episode by change(data)."""

    def mutate(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            group = file["episode_00001"]
            value = change(group[key][()])
            del group[key]
            group[key] = value

    return mutate


def attribute(name: str, value: object) -> Callable[[Path], None]:
    def mutate(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file.attrs.pop(name, None)
            if value is not None:
                file.attrs[name] = value

    return mutate


def remove(name: str) -> Callable[[Path], None]:
    def mutate(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            for key in list(file) if name == "*" else [name]:
                del file[key]

    return mutate


def set_item(value: np.ndarray, index: int, item: float) -> np.ndarray:
    value[index] = item
    return value


def flip_bytes(path: Path) -> None:
    with h5py.File(path) as file:
        offset = file["episode_00001/pixels"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 20] ^= 0xFF
    path.write_bytes(content)


BAD_FILES = {
    "missing": (Path.unlink, "there is no such file"),
    "empty": (lambda p: p.write_bytes(b""), r"the file is empty \(0 bytes\)"),
    "not HDF5": (lambda p: p.write_text("frames, frames, frames"), "not an HDF5 file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "truncated or damaged"),
    "another format": (attribute("format_version", 99), "'format_version' is 99, expected 1 or 2"),
    "unfinished": (attribute("complete", False), "'complete' is not set"),
    "attribute missing": (attribute("task", None), "attribute 'task' is missing"),
    "another domain": (attribute("domain", "walker"), "'domain' is walker, expected cartpole; pass --domain walker"),
    "another task": (attribute("task", "balance"), "'task' is balance, expected swingup; pass --task balance"),
    "another quality": (attribute("render_quality", "full"), "'render_quality' is full, expected fast; pass --render-quality full"),
    "another camera": (attribute("camera", "back"), "'camera' is back, expected 0; pass --camera back"),
    "another frame skip": (attribute("frame_skip", 2), "'frame_skip' is 2, expected 4; pass --frame-skip 2"),
    "another action width": (attribute("action_dim", 3), "'action_dim' is 3, expected 2"),
    "no episode": (remove("*"), "no group 'episode_00000'"),
    "data set missing": (remove("episode_00001/reward"), "'episode_00001/reward' is missing"),
    "wrong dtype": (
        replace("pixels", lambda x: x.astype(np.float32)),
        r"'episode_00001/pixels' is float32, expected uint8 \[T, 8, 8, 3\]; re-collect it with",
    ),
    "wrong shape": (
        replace("pixels", lambda x: x.transpose(0, 3, 1, 2)),
        r"'episode_00001/pixels' has shape \[40, 3, 8, 8\], expected uint8 \[T, 8, 8, 3\]",
    ),
    "wrong action width": (
        replace("action", lambda x: x[:, :1]),
        r"'episode_00001/action' has shape \[40, 1\], expected float32 \[40, 2\]",
    ),
    "too few rewards": (replace("reward", lambda x: x[:-1]), r"'episode_00001/reward' has shape \[39\], expected float32 \[40\]"),
    "no frames": (replace("pixels", lambda x: x[:0]), r"has shape \[0, 8, 8, 3\]"),
    "action out of range": (
        replace("action", lambda x: set_item(x, 7, 1.5)),
        r"'episode_00001/action' holds 1.5 at frame 7, expected finite values in \[-1, 1\]",
    ),
    "reward not finite": (replace("reward", lambda x: set_item(x, 3, np.nan)), "'episode_00001/reward' holds nan at frame 3"),
    "start in the middle": (replace("is_init", lambda x: set_item(x, 5, True)), r"is_init' is true at frames \[0, 5\]"),
    "attribute changed": (attribute("policy", "swing"), "the attributes or the list of episodes differ from the checksum"),
    "episode removed": (remove("episode_00000"), "the attributes or the list of episodes differ from the checksum"),
    "frames changed": (replace("reward", lambda x: x + 1), "the frames of 'episode_00001' differ from its checksum"),
    "flipped bits": (flip_bytes, "'episode_00001/pixels' is damaged"),
}


UNSEALED = ("missing", "empty", "not HDF5", "truncated", "flipped bits", "attribute changed", "episode removed", "frames changed")


@pytest.mark.parametrize("name", BAD_FILES)
def test_each_bad_file_has_one_clear_error(shard, name):
    path = shard()
    mutate, message = BAD_FILES[name]
    mutate(path)
    if name not in UNSEALED:
        seal(path)

    def read() -> None:
        data = DMCVBDataset(path, 10, **CHECKED)
        data.read_episode(1)

    with pytest.raises(DataError, match=message) as error:
        read()
    assert str(path) in str(error.value)
    assert ";" in str(error.value), "no remedy: it follows a semicolon"


def test_too_short_episodes_are_left_out_and_counted(shard, capfd):
    path, other = shard(), shard((5, 60), "other.h5")
    data = DMCVBDataset(path, 18)
    assert (data.num_episodes, data.lengths, data.skipped) == (2, [23, 40], [f"{path}: episode_00002"])
    said = f"1 of 3 episodes is left out, shorter than 18 frames (--sequence-length); the first is {path}: episode_00002\n"
    assert capfd.readouterr().err == said
    both = DMCVBDataset([path, other], 18)
    assert (both.lengths, len(both.identities), len(both.skipped)) == ([23, 40, 60], 3, 2)
    assert both.identities[:2] == data.identities
    assert len(both.read_episode(2)) == 60
    assert DMCVBDataset(path, 17).skipped == []


def test_data_of_which_every_episode_is_too_short_are_refused(shard):
    for paths in (shard(), [shard(), shard((5,), "other.h5")]):
        with pytest.raises(DataError, match=r"good.h5: the longest episode has 40 frames, expected at least 41 .*; pass a shorter"):
            DMCVBDataset(paths, 41)


@pytest.mark.parametrize("changed", [{"task": "balance"}, {"render_quality": "full"}, {"image_size": 9}, {"action_dim": 1}])
def test_shards_of_different_recordings_do_not_mix(shard, changed):
    folder = shard(name="a.h5").parent
    shard(name="b.h5", **changed)
    with pytest.raises(DataError, match=f"b.h5: attribute '{next(iter(changed))}' is .* cannot be mixed"):
        DMCVBDataset(folder, 10)
