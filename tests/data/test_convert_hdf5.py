"""HDF5 of other programs, as they write it, converted: the very episodes, or one clear line and no file."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from aime_fast.convert import main
from aime_fast.data import DMCVBDataset
from aime_fast.data.foreign import READERS, Names, read
from aime_fast.data.foreign.episode import build
from aime_fast.errors import ConfigError, DataError

ROWS = [20, 20, 20]  # of the episodes of the simulator
ALL = sum(ROWS)
FIRST = np.arange(ALL) % 20 == 0
FINAL = np.roll(FIRST, -1)
SAMPLES = Path(__file__).parent / "samples"
TERMINAL = ("is_terminal", "terminal", "terminals", "terminated", "terminations", "dones", "done")
CUT = ("is_last", "truncations", "truncated", "timeouts")


def convert(source: Path, out: Path, *flags: str) -> DMCVBDataset:
    main([str(source), "--out", str(out), "--image-size", "16", "--source-frame-skip", "50", "--no-progress", *flags])
    return DMCVBDataset(out, 1)


def assert_same(data: DMCVBDataset, episodes: list[dict], frames: slice = slice(None)) -> None:
    assert data.num_episodes == len(episodes)
    for i, episode in enumerate(episodes):
        found = data.read_episode(i)
        assert torch.equal(found["pixels"].permute(0, 2, 3, 1), torch.from_numpy(episode["pixels"][frames]))
        assert torch.equal(found["action"], torch.from_numpy(episode["action"][frames]))
        assert torch.equal(found["reward"][:, 0], torch.from_numpy(episode["reward"][frames]))


def discounts(data: DMCVBDataset) -> list[list[float]]:
    return [data.read_episode(i)["discount"][:, 0].tolist() for i in range(data.num_episodes)]


def led(part: np.ndarray, first: float = 0) -> np.ndarray:
    """Rows that lie with the picture that they led to, something else with the first."""
    return np.concatenate([np.full_like(part[:1], first), part[:-1]])


def write(path: Path, columns: dict[str, np.ndarray], **settings: object) -> Path:
    with h5py.File(path, "w") as file:
        for name, part in columns.items():
            file.create_dataset(name, data=part, **settings)
    return path


def joined(episodes: list[dict], **columns: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of all episodes, and more."""
    names = {"observation": "pixels", "action": "action", "reward": "reward"}
    found = {name: np.concatenate([episode[part] for episode in episodes]) for name, part in names.items()} | columns
    return {name: part for name, part in found.items() if part is not None}


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Converts what must be refused; returns the message, which is one line and leaves nothing."""

    def run(source: Path, *flags: str, error: type[Exception] = DataError) -> str:
        with pytest.raises(error) as caught:
            convert(source, tmp_path / "refused.h5", *flags)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("refused*"))
        return str(caught.value)

    return run


def test_without_actions(tmp_path, episodes):
    """Whatever was recorded: nothing, or what is left out with the last picture."""
    for i, columns in enumerate((joined(episodes, ep_len=np.array(ROWS), action=None), stable_worldmodel(episodes))):
        flags = ("--map", "reward=next/reward") if i else ()
        data = convert(write(tmp_path / f"{i}.h5", columns), tmp_path / f"a{i}.h5", "--actions", "none", *flags)
        assert_same(data, [{**e, "action": np.zeros((20, 1), np.float32)} for e in episodes], slice(0, -1 if i else None))
    assert [row[-1] for row in discounts(data)] == [1, 0, 1]


@pytest.mark.parametrize(("sample", "camera"), [("png", "pixels"), ("raw", "pixels"), ("raw", "packed")])
def test_without_actions_in_rlds(tmp_path, sample, camera):
    flags = ("--map", f"pixels=observation/{camera}", "reward=reward", "--find-action-range")
    recorded = convert(SAMPLES / "rlds" / sample, tmp_path / "a.h5", *flags)
    without = convert(SAMPLES / "rlds" / sample, tmp_path / "b.h5", *flags, "--actions", "none")
    assert without.lengths == recorded.lengths
    assert without.action_dim == 1
    for i in range(without.num_episodes):
        one, other = recorded.read_episode(i), without.read_episode(i)
        assert not other["action"].any()
        assert all(torch.equal(one[name], other[name]) for name in ("pixels", "reward", "discount"))


def write_groups(path: Path, episodes: list[dict], **changes: Callable[[np.ndarray], object]) -> Path:
    """As robomimic, with one more picture than actions; `changes` are those of the episode in the middle."""
    with h5py.File(path, "w") as file:
        for i in (10, 2, 0):
            group, e = file.create_group(f"data/demo_{i}"), episodes[{0: 0, 2: 1, 10: 2}[i]]
            columns = {"image": np.concatenate([e["pixels"], e["pixels"][-1:]]), "actions": e["action"], "rewards": e["reward"]}
            for name in {**columns, **(changes if i == 2 else {})}:
                part = changes.get(name, lambda x: x)(columns.get(name)) if i == 2 else columns[name]
                if part is not None:
                    group[name] = part
    return path


def test_a_group_an_episode(tmp_path, episodes, refused):
    source = write_groups(tmp_path / "demo.hdf5", episodes)
    assert_same(convert(source, tmp_path / "a.h5"), episodes)
    with h5py.File(source, "a") as file:
        for group in file["data"].values():
            group["obs/agentview_image"] = group["image"][()]
            del group["image"]
    assert "which is pixels? there are actions, obs/agentview_image, rewards; say so with --map pixels=NAME" in refused(source)
    assert_same(convert(source, tmp_path / "b.h5", "--map", "pixels=obs/agentview_image"), episodes)


MARKS = {
    "ep_len": ROWS, "episode_lengths": ROWS, "episode_ends": np.cumsum(ROWS), "meta/episode_ends": np.cumsum(ROWS), "is_first": FIRST,
    **dict.fromkeys((*TERMINAL, *CUT), FINAL),
}  # fmt: skip


@pytest.mark.parametrize("cut", MARKS)
def test_columns_of_all_episodes(tmp_path, episodes, cut):
    data = convert(write(tmp_path / "shard.hdf5", joined(episodes, **{cut: np.array(MARKS[cut])})), tmp_path / "a.h5")
    assert_same(data, episodes)
    assert discounts(data) == [[1.0] * 19 + [float(cut not in TERMINAL)]] * 3


def test_a_task_ends_where_something_is_terminal_an_episode_also_where_it_is_cut_off(tmp_path, episodes):
    once = FINAL & (np.arange(ALL) == 19)
    for i, columns in enumerate((dict(terminals=once, timeouts=FINAL & ~once), dict(dones=FINAL, truncations=FINAL & ~once))):
        data = convert(write(tmp_path / f"{i}.hdf5", joined(episodes, **columns)), tmp_path / f"a{i}.h5")
        assert_same(data, episodes)
        assert [row[-1] for row in discounts(data)] == [0, 1, 1]
    data = convert(tmp_path / "1.hdf5", tmp_path / "b.h5", "--map", "terminal=dones")
    assert [row[-1] for row in discounts(data)] == [0, 0, 0]


def test_v_d4rl(tmp_path, episodes):
    """As their npz_to_hdf5.py: the arrays of Dreamer one after the other, 0, 1 ... 1, 2 as step types."""
    step_type = np.ones(20)
    step_type[[0, -1]] = 0, 2
    columns = {
        "action": np.concatenate([led(e["action"]) for e in episodes]), "discount": np.ones(ALL, np.float32),
        "observation": np.concatenate([e["pixels"].transpose(0, 3, 1, 2) for e in episodes]),
        "reward": np.concatenate([led(e["reward"]) for e in episodes]), "step_type": np.tile(step_type, 3),
    }  # fmt: skip
    source = write(tmp_path / "data.hdf5", columns, compression="gzip")
    assert_same(convert(source, tmp_path / "a.h5"), episodes, slice(0, -1))
    as_written = [{**e, "action": led(e["action"]), "reward": led(e["reward"])} for e in episodes]
    assert_same(convert(source, tmp_path / "b.h5", "--action-leads", "False"), as_written)
    part = write(tmp_path / "part.hdf5", {name: column[5:] for name, column in columns.items()})  # shards are split anywhere
    rest = [{name: column[5:] for name, column in episodes[0].items()}, *episodes[1:]]
    assert_same(convert(part, tmp_path / "c.h5"), rest, slice(0, -1))


def stable_worldmodel(episodes: list[dict]) -> dict[str, np.ndarray]:
    """Columns as World.record_dataset writes them: of a picture the reward and flags that came with it, something else with the first."""
    columns = {
        "pixels": [e["pixels"] for e in episodes], "action": [np.roll(led(e["action"], np.nan), -1, 0) for e in episodes],
        "reward": [led(e["reward"], np.nan) for e in episodes],
    }  # fmt: skip
    flags = {"terminated": FINAL & (np.arange(ALL) == 39), "truncated": FINAL & (np.arange(ALL) != 39)}
    listed = {"ep_offset": np.cumsum([0, *ROWS[:-1]]), "ep_len": np.array(ROWS, np.int32)}
    return {name: np.concatenate(parts) for name, parts in columns.items()} | flags | listed


def test_stable_worldmodel(tmp_path, episodes, refused):
    source = write(tmp_path / "world.h5", stable_worldmodel(episodes))
    says = "episode 0, rows 0 to 20: 20 reward, 19 actions; where a reward lies with the picture that it came with pass --map reward=next/"
    assert says in refused(source)
    data = convert(source, tmp_path / "a.h5", "--map", "reward=next/reward")
    assert_same(data, episodes, slice(0, -1))
    assert discounts(data) == [[1.0] * 18 + [float(i != 1)] for i in range(3)]
    says = refused(source, "--map", "reward=next/reward", "--action-leads", "True", error=ConfigError)
    assert "--map reward=next/reward: next/ is for action, reward, discount and excludes --action-leads True" in says


def test_rewards_of_the_following_row(tmp_path, episodes, refused):
    """In groups and in columns; a column that is itself called next/reward is what it says."""
    moved = [{**e, "reward": led(e["reward"], np.nan)} for e in episodes]
    columns = write(tmp_path / "columns.h5", joined(moved, ep_len=np.array(ROWS), terminated=FINAL))
    assert "reward of row 0 is nan, expected a finite number" in refused(columns)
    data = convert(columns, tmp_path / "a.h5", "--map", "reward=next/reward")
    assert_same(data, episodes, slice(0, -1))
    assert [row[-1] for row in discounts(data)] == [0, 0, 0]  # what is terminal moves with the picture that is left out
    with h5py.File(tmp_path / "groups.h5", "w") as file:
        for i, e in enumerate(moved):
            file[f"traj_{i}/pixels"], file[f"traj_{i}/action"] = e["pixels"], e["action"]
            file[f"traj_{i}/r"], file[f"traj_{i}/next/reward"] = e["reward"], episodes[i]["reward"]
    assert_same(convert(tmp_path / "groups.h5", tmp_path / "b.h5", "--map", "reward=next/r"), episodes, slice(0, -1))
    assert_same(convert(tmp_path / "groups.h5", tmp_path / "c.h5", "--map", "reward=next/reward"), episodes)
    assert "--map pixels=next/pixels: next/ is for action, reward" in refused(columns, "--map", "pixels=next/pixels", error=ConfigError)
    steps = write(tmp_path / "steps.h5", joined(moved, step_type=2.0 * FINAL + (1 - FIRST - FINAL)))
    message = refused(steps, "--map", "reward=next/reward", error=ConfigError)
    assert "excludes --action-leads True, which is the default beside a column step_type" in message


NONE = np.zeros(ALL, bool)
BOUNDS = [
    ({}, (), r"where do episodes begin\? there is none of ep_len, .*step_type, is_first, .*truncat.*--map first=NAME"),
    ({"episode_ends": [20, 40, 61]}, (), r"by episode_ends episode 2 is rows 40 to 61 of 60; name a column .*--map first=NAME"),
    ({"episode_ends": [20, 40]}, (), r"by episode_ends the last episode ends with row 40 of 60; "),
    ({"episode_ends": [20, 40, 40, 60]}, (), r"by episode_ends episode 2 is rows 40 to 40 of 60"),
    ({"episode_ends": [20.0, 40.5, 60]}, (), r"episode_ends is float64, expected whole numbers, one an episode"),
    ({"episode_ends": FINAL}, (), r"episode_ends is bool, expected whole numbers, one an episode; .*last=NAME"),
    ({"ep_len": [20, 20, 19]}, (), r"by ep_len the last episode ends with row 59 of 60"),
    ({"ep_len": [20, 0, 40]}, (), r"by ep_len episode 1 is rows 20 to 20 of 60"),
    ({"ep_len": [20, np.nan, 40]}, (), r"ep_len is float64, expected whole numbers"),
    ({"ep_len": ROWS, "ep_offset": [0, 20]}, (), r"ep_offset is not where episodes begin by ep_len"),
    ({"ep_len": ROWS, "ep_offset": [40, 20, 0]}, (), r"ep_offset is not where episodes begin by ep_len"),
    ({"terminals": NONE, "timeouts": NONE}, (), r".* begin\? terminals, timeouts marks no row, not even the last; .*--map first=NAME"),
    ({"is_first": NONE, "is_last": NONE}, (), r".* is_first, is_last marks no row"),
    ({"timeouts": 2 * FINAL}, (), r"timeouts of row 19 is 2, expected one of 0, 1"),
    ({"terminals": np.where(FINAL, np.nan, 0)}, (), r"terminals of row 19 is nan, expected one of 0, 1"),
    ({"step_type": 3 * FINAL}, (), r"step_type of row 19 is 3, expected one of 0, 1, 2"),
    ({"timeouts": FINAL[:-1]}, (), r"timeouts has 59 rows, pixels have 60"),
    ({"is_first": FIRST, "reward": np.zeros(59)}, (), r"reward has 59 rows, pixels have 60"),
    ({"is_first": np.arange(ALL) == 0, "truncated": FINAL}, (), r"truncated marks row 19 as the last of an episode, is_first not the next"),
    ({"odd": FINAL}, ("--map", "last=other"), r"--map last=other: there are .*odd"),
]


@pytest.mark.parametrize(("columns", "flags", "says"), BOUNDS)
def test_where_episodes_are_is_unclear(tmp_path, episodes, refused, columns, flags, says):
    source = write(tmp_path / "shard.h5", joined(episodes, **{name: np.array(part) for name, part in columns.items()}))
    assert re.search(r"shard\.h5: " + says, refused(source, *flags))


def test_what_the_user_names_decides(tmp_path, episodes):
    """Over lengths and over columns that contradict it; one episode whose last row alone is marked is one."""
    wrong = {"ep_len": np.array([60]), "is_first": np.arange(ALL) == 0, "truncated": np.arange(ALL) % 7 == 0}
    source = write(tmp_path / "shard.h5", joined(episodes, begin=FIRST, end=FINAL, **wrong))
    for i, flag in enumerate(("first=begin", "last=end")):
        assert_same(convert(source, tmp_path / f"{i}.h5", "--map", flag), episodes)
    whole = [{name: np.concatenate([e[name] for e in episodes]) for name in episodes[0]}]
    for i, columns in enumerate(({"timeouts": np.arange(ALL) == 59}, {"is_first": np.arange(ALL) == 0})):
        assert_same(convert(write(tmp_path / f"one{i}.h5", joined(episodes, **columns)), tmp_path / f"b{i}.h5"), whole)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"is_first": np.arange(21) % 10 == 0}, r"is_first is 1 at rows 0, 10, 20 of 21, expected one episode a group, 1 at row 0 alone"),
        ({"is_last": np.arange(20) % 9 == 8}, r"is_last is 1 at rows 8, 17 of 20, expected one episode a group, 1 at row 19 alone"),
        (
            {"step_type": (np.arange(20) % 10 > 0) * 1},
            r"step_type is 0 at rows 0, 10 of 20, expected one episode a group, 0 at row 0 alone",
        ),
    ],
)
def test_a_group_that_holds_several(tmp_path, episodes, refused, columns, says):
    source = write_groups(tmp_path / "demo.hdf5", episodes, **{name: lambda x, part=part: part for name, part in columns.items()})
    assert f"demo.hdf5: /data/demo_2: {says}" in _first_is_kept(tmp_path, source)


def _first_is_kept(tmp_path: Path, source: Path) -> str:
    """The message, after the episode before it is written."""
    with pytest.raises(DataError) as caught:
        convert(source, tmp_path / "a.h5")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.h5").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"actions": lambda x: None}, "/data/demo_2: which is action? there are image, rewards"),
        ({"image": lambda x: x[..., 0]}, "/data/demo_2: pixels are uint8 [21, 16, 16], expected uint8 [T, H, W, 3] or [T, 3, H, W]"),
        ({"image": lambda x: x / 255}, "/data/demo_2: pixels are float64 [21, 16, 16, 3], expected uint8"),
        ({"actions": lambda x: x[:7]}, "/data/demo_2: 7 actions for 21 pictures, expected as many, or one less"),
        (
            {"rewards": lambda x: ["text"] * 20},
            "/data/demo_2: rewards are object, expected numbers; choose another column with --map reward",
        ),
    ],
)
def test_a_group_of_another_shape(tmp_path, episodes, changes, says):
    assert f"demo.hdf5: {says}" in _first_is_kept(tmp_path, write_groups(tmp_path / "demo.hdf5", episodes, **changes))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"action": None}, "which is action? there are ep_len, observation, reward"),
        (
            {"observation": np.zeros((ALL, 16, 16), np.uint8)},
            "episode 0, rows 0 to 20: pixels are uint8 [20, 16, 16], expected uint8 [T, H",
        ),
        ({"observation": np.zeros((ALL, 16, 16, 4), np.uint8)}, "episode 0, rows 0 to 20: pixels are uint8 [20, 16, 16, 4], expected"),
    ],
)
def test_columns_of_another_shape(tmp_path, episodes, refused, columns, says):
    source = write(tmp_path / "shard.h5", joined(episodes, **{"ep_len": np.array(ROWS), **columns}))
    assert f"shard.h5: {says}" in refused(source)


def damage(source: Path, name: str, row: int) -> None:
    """Changes bytes of the chunk in which this row lies."""
    with h5py.File(source) as file:
        offset, size = next(
            (chunk.byte_offset, chunk.size)
            for chunk in (file[name].id.get_chunk_info(i) for i in range(file[name].id.get_num_chunks()))
            if chunk.chunk_offset[0] <= row < chunk.chunk_offset[0] + file[name].chunks[0]
        )
    content = bytearray(source.read_bytes())
    content[offset + size // 2] ^= 0xFF
    source.write_bytes(content)


@pytest.mark.parametrize("name", ["observation", "action", "reward", "ep_len"])
def test_a_damaged_chunk(tmp_path, episodes, name):
    source = tmp_path / "shard.h5"
    with h5py.File(source, "w") as file:
        for key, part in joined(episodes, ep_len=np.array(ROWS)).items():
            file.create_dataset(key, data=part, chunks=(min(10, len(part)), *part.shape[1:]), fletcher32=True)
    damage(source, name, 0 if name == "ep_len" else 25)
    place = "" if name == "ep_len" else "episode 1, rows 20 to 40: "
    message = _first_is_kept(tmp_path, source)
    assert f"shard.h5: {place}{name}: cannot be read (" in message
    assert "copy it again" in message
    assert ("1 episodes are in" in message) == bool(place)


@pytest.mark.parametrize("groups", [False, True])
def test_a_truncated_file(tmp_path, episodes, refused, groups):
    source = tmp_path / "shard.h5"
    write_groups(source, episodes) if groups else write(source, joined(episodes, ep_len=np.array(ROWS)))
    content = source.read_bytes()
    for part in (content[: len(content) // 2], content[:100], b"", bytes(4096)):
        source.write_bytes(part)
        assert "shard.h5: cannot be read (" in refused(source)


def test_pictures_compressed_by_what_h5py_lacks(tmp_path, episodes, refused, monkeypatch):
    columns = stable_worldmodel(episodes)
    pixels = columns.pop("pixels")
    source = write(tmp_path / "lacks.h5", columns)
    with h5py.File(source, "a") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((10, *pixels.shape[1:]))
        properties.set_filter(32999, h5py.h5z.FLAG_OPTIONAL)  # no program has it
        name, space = b"pixels", h5py.h5s.create_simple(pixels.shape)
        held = h5py.h5d.create(file.id, name, h5py.h5t.NATIVE_UINT8, space, properties)
        held.write_direct_chunk((0, 0, 0, 0), b"what the filter made of it")
    message = refused(source, "--map", "reward=next/reward")
    assert "lacks.h5: episode 0, rows 0 to 20: pixels: compressed with unnamed (32999), which h5py lacks; pip install hdf5plugin" in message

    hdf5plugin = pytest.importorskip("hdf5plugin")
    with h5py.File(tmp_path / "blosc.h5", "w") as file:
        for name, part in columns.items():
            file[name] = part
        file.create_dataset("pixels", data=pixels, chunks=(10, 16, 16, 3), compression=hdf5plugin.Blosc(cname="lz4", clevel=5))
    assert_same(convert(tmp_path / "blosc.h5", tmp_path / "a.h5", "--map", "reward=next/reward"), episodes, slice(0, -1))


def test_pictures_as_files_in_a_column(tmp_path, episodes):
    from PIL import Image

    columns = joined(episodes, ep_len=np.array(ROWS))
    pixels = columns.pop("observation")
    source = write(tmp_path / "png.h5", columns)
    with h5py.File(source, "a") as file:
        held = file.create_dataset("image", len(pixels), h5py.vlen_dtype(np.uint8))
        for t, picture in enumerate(pixels):
            Image.fromarray(picture).save(coded := BytesIO(), "png")
            held[t] = np.frombuffer(coded.getvalue(), np.uint8)
    assert_same(convert(source, tmp_path / "a.h5"), episodes)


@pytest.mark.parametrize("form", READERS)
def test_what_map_does_not_know(tmp_path, form):
    with pytest.raises(ConfigError, match=r"--map pixel=x: pixel is none of pixels, action, reward, discount, terminal, first, last$"):
        next(read(tmp_path, form, Names({"pixel": "x"})))


def test_arrays_of_which_one_is_shorter(episodes):
    """The least number of rows counts; what is terminal in a row without an action is about its picture."""
    e, ended = episodes[0], np.arange(20) == 19
    short = build("x", {**e, "reward": e["reward"][:-1]}, leads=False)
    assert {len(short.pixels), len(short.action), len(short.reward), len(short.discount)} == {19}
    led_to = build("x", {"pixels": e["pixels"], "action": led(e["action"]), "reward": e["reward"][:-1]}, leads=True)
    assert np.array_equal(led_to.action, e["action"][:-1])
    assert np.array_equal(led_to.reward, e["reward"][:-1])
    terminal = build("x", {"pixels": e["pixels"], "action": e["action"][:-1], "terminal": ended}, leads=False)
    assert terminal.discount.tolist() == [1.0] * 18 + [0.0]
    with pytest.raises(DataError, match="x: 1 pictures and no action after one, expected at least one"):
        build("x", {"pixels": e["pixels"][:1], "action": e["action"][:1], "reward": e["reward"][:0]}, leads=False)
