"""What the system or a strange file says about data becomes one DataError with the place and a remedy."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from dm_env import specs
from recordings import ATTRIBUTES, random_episode, seal, unseal

from aime_fast.config import DataConfig
from aime_fast.data import DMCVBDataset, EpisodeWriter, collect, make_batches
from aime_fast.data.environments import check_actions
from aime_fast.errors import DataError

GARBAGE = {
    "an array for a name": ("domain", ["cartpole", "walker"], r"'domain' is \('cartpole', 'walker'\), expected text"),
    "a number for a name": ("task", 3, "'task' is 3, expected text"),
    "an array for a size": ("image_size", [8, 8], r"'image_size' is \(8, 8\), expected a whole number of at least 1"),
    "an array of one": ("image_size", [8], r"'image_size' is \(8,\), expected a whole number"),
    "text for a number": ("frame_skip", "four", "'frame_skip' is 'four', expected a whole number"),
    "a fraction": ("action_dim", 2.0, "'action_dim' is 2.0, expected a whole number"),
    "a negative number": ("action_dim", -2, "'action_dim' is -2, expected a whole number"),
    "nothing": ("render_quality", h5py.Empty("f"), "'render_quality' is .*, expected text"),
    "bytes that are no text": ("domain", np.bytes_(b"\xff\xfe"), "attribute 'domain' is damaged"),
    "a record": ("image_size", np.zeros(2, [("x", "i4"), ("y", "f8")]), "'image_size' is .*, expected a whole number"),
    "versions that are not JSON": ("versions", "{", "'versions' is '{', expected a JSON object"),
    "versions that are a number": ("versions", 4, "'versions' is 4, expected a JSON object"),
    "versions that are a list": ("versions", "[1, 2]", r"'versions' is '\[1, 2\]', expected a JSON object"),
    "names that are numbers": ("position_names", [1, 2], r"'position_names' is \(1, 2\), expected a list of names"),
    "many flags": ("complete", [True, True], "'complete' is not set"),
    "an array for the format": ("format_version", [2, 2], r"'format_version' is \(2, 2\), expected 1 or 2"),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_in_an_attribute_is_named(shard, case, old):
    name, value, message = GARBAGE[case]
    path = shard()
    if old:
        unseal(path)
    with h5py.File(path, "r+") as file:
        file.attrs.pop(name, None)
        file.attrs[name] = value
    if not old and case != "bytes that are no text":
        seal(path)
    with pytest.raises(DataError, match=message) as error:
        DMCVBDataset(path, 10, domain="cartpole", image_size=8)
    assert "; " in str(error.value)
    assert "\n" not in str(error.value)


def test_groups_that_are_no_episodes_are_named(shard):
    for kind, message in (("dataset", "'episode_00003' is damaged|'sha256'|is missing"), ("empty group", "pixels' is missing")):
        path = shard(name=f"{kind}.h5")
        unseal(path)
        with h5py.File(path, "r+") as file:
            if kind == "dataset":
                file["episode_00003"] = np.zeros(3)
            else:
                file.create_group("episode_00003")
        with pytest.raises(DataError, match=message):
            DMCVBDataset(path, 10)


def test_data_of_another_action_width_are_refused(shard):
    with pytest.raises(DataError, match="'action_dim' is 2, expected 6; use the settings of the task it was recorded with"):
        DMCVBDataset(shard(), 10, action_dim=6)


def as_nobody(action) -> None:
    os.seteuid(65534)
    try:
        action()
    finally:
        os.seteuid(0)


def bad_paths(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "file").write_bytes(b"")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "ENOTDIR": (folder / "file" / "a.h5", "Not a directory; a part of the path is a file"),
        "ENAMETOOLONG": (folder / ("x" * 300 + ".h5"), "File name too long; choose a shorter name"),
        "ELOOP": (folder / "loop", "Too many levels of symbolic links; "),
    }


@pytest.mark.parametrize("case", ["ENOTDIR", "ENAMETOOLONG", "ELOOP"])
def test_paths_that_the_system_refuses(tmp_path, case):
    path, message = bad_paths(tmp_path)[case]
    settings = DataConfig(data=str(path), image_size=16)
    for use in (
        lambda: DMCVBDataset(path, 10),
        lambda: make_batches(settings, 0),
        lambda: EpisodeWriter(path, ATTRIBUTES),
        lambda: collect(settings, 0, path),
    ):
        with pytest.raises(DataError, match=message) as error:
            use()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_folder_or_file_without_permission(shard):
    if os.geteuid():
        pytest.skip("needs another user")
    path = shard()
    for use in (
        lambda: DMCVBDataset(path, 10),
        lambda: DMCVBDataset(path.parent, 10),
        lambda: EpisodeWriter(path.parent / "b.h5", ATTRIBUTES),
    ):
        with pytest.raises(DataError, match="Permission denied; change its permissions"):
            as_nobody(use)


def test_a_file_system_that_is_read_only(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        for path in (tmp_path / "a.h5", tmp_path / "new" / "a.h5"):
            with pytest.raises(DataError, match="Read-only file system; the file system is read-only"):
                EpisodeWriter(path, ATTRIBUTES)
            with pytest.raises(DataError, match="Read-only file system; the file system is read-only"):
                collect(DataConfig(image_size=16), 0, path, progress=False)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    "episode",
    [
        {**random_episode(20), "pixels": np.zeros((0, 8, 8, 3), np.uint8)},
        {**random_episode(20), "pixels": np.uint8(3)},
        {**random_episode(20), "reward": np.zeros(3, np.float32)},
        {key: value for key, value in random_episode(20).items() if key != "action"},
        {**random_episode(20), "action": np.full((20, 2), None)},
    ],
    ids=["no frames", "no picture", "few rewards", "no actions", "objects"],
)
def test_an_episode_that_is_none_is_not_written(tmp_path, episode):
    with pytest.raises(DataError, match=r"a\.h5: dataset 'episode_00000/"), EpisodeWriter(tmp_path / "a.h5", ATTRIBUTES) as writer:
        writer.write(episode)
    assert list(tmp_path.iterdir()) == []


def test_an_action_that_can_only_be_one_value_is_named():
    """No task of dm_control has one."""
    spec = specs.BoundedArray((2,), np.float32, minimum=[-1.0, 0.5], maximum=[1.0, 0.5])
    with pytest.raises(DataError, match=r"--domain cartpole --task swingup: an action can only be 0\.5, so there is nothing to choose"):
        check_actions(DataConfig(), SimpleNamespace(action_spec=lambda: spec))
