"""Minari data sets as Minari wrote them (samples/minari/make_minari.py), converted: the very episodes, or one clear line and no file."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from aime_fast.convert import main
from aime_fast.data import DMCVBDataset
from aime_fast.errors import DataError

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """Unpacks a data set; returns its folder."""

    def unpack(name: str) -> Path:
        with zipfile.ZipFile(SAMPLES / "minari" / "samples.zip") as file:
            file.extractall(tmp_path / "source", [member for member in file.namelist() if member.startswith(f"{name}-v0/")])
        return tmp_path / "source" / f"{name}-v0"

    return unpack


def convert(source: Path, out: Path, *flags: str) -> DMCVBDataset:
    main([str(source), "--out", str(out), "--image-size", "16", "--no-progress", *flags])
    return DMCVBDataset(out, 1)


@pytest.mark.parametrize("name", ["dict_hdf5", "dict_arrow", "box_parquet"])
def test_the_very_episodes(tmp_path, source, name):
    data = convert(source(name), tmp_path / "a.h5")
    assert (data.num_episodes, data.attributes["source_format"]) == (3, "minari")
    with np.load(SAMPLES / "rlds" / "episodes.npz") as file:
        for i in range(3):
            found = data.read_episode(i)
            steps = len(file[f"action_{i}"]) - 1  # after the last picture no action is known
            off = found["pixels"].permute(0, 2, 3, 1).float() - torch.from_numpy(file[f"pixels_{i}"][:steps]).float()
            assert off.abs().mean() <= (0 if name == "dict_arrow" else 8)  # the others are JPEG
            assert torch.equal(found["action"], torch.from_numpy(file[f"action_{i}"][:steps]))
            assert torch.equal(found["reward"][:, 0], torch.from_numpy(file[f"reward_{i}"][:steps]))
            assert found["discount"][:, 0].tolist() == [1.0] * (steps - 1) + [float(i != 1)]


def test_a_data_set_is_found_by_its_parts(tmp_path, source):
    """By its HDF5 file alone, as before Minari 0.5; pictures as numbers, and by --map."""
    folder = source("dict_hdf5") / "data"
    (folder / "metadata.json").unlink()
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        for group in file.values():
            group["observations/top"] = np.zeros((len(group["actions"]) + 1, 16, 16, 3), np.uint8)
    data = convert(folder / "main_data.hdf5", tmp_path / "a.h5", "--map", "pixels=observations/top")
    assert data.attributes["source_format"] == "minari"
    assert not data.read_episode(0)["pixels"].any()


def change_metadata(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "data" / "metadata.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def change_group(change: Callable[[h5py.Group], None]) -> Callable[[Path], None]:
    def within(folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            change(file["episode_1"])

    return within


def replace(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def within(group: h5py.Group) -> None:
        values = change(group[name][()])
        del group[name]
        group[name] = values

    return change_group(within)


def damage_jpeg(folder: Path) -> None:
    def within(group: h5py.Group) -> None:
        group["observations/pixels"][1] = group["observations/pixels"][1][:99]

    change_group(within)(folder)


def change_parquet(change: Callable) -> Callable[[Path], None]:
    def within(folder: Path) -> None:
        path = folder / "data" / "1" / "part-0.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return within


def change_bytes(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


MAIN = "data/main_data.hdf5"
PARQUET = "data/1/part-0.parquet"
BAD = [
    ("dict_hdf5", change_bytes("data/metadata.json", half), r"metadata.json: cannot be read \("),
    ("dict_hdf5", change_metadata(data_format="lance"), r"metadata.json: data_format lance, expected hdf5, arrow or parquet"),
    ("dict_hdf5", change_metadata(total_episodes=4), r"data: 3 episodes, metadata.json says 4"),
    ("dict_hdf5", lambda f: (f / MAIN).unlink(), r"main_data.hdf5: missing"),
    ("dict_hdf5", change_bytes(MAIN, half), r"main_data.hdf5: cannot be read \("),
    ("dict_hdf5", damage_jpeg, r"main_data.hdf5: /episode_1: picture 1: cannot be read \("),
    ("dict_hdf5", replace("observations/pixels", lambda x: np.zeros((3, 8, 8))), r"/episode_1: pixels are float64 \[3, 8, 8\]"),
    ("dict_hdf5", replace("actions", lambda x: x[:1]), r"/episode_1: 1 actions for 3 pictures, expected as many, or one less"),
    ("dict_hdf5", replace("actions", lambda x: 3 + x), r"/episode_1: action 0 of row 0 is .* outside \[-1, 1\]"),
    ("dict_hdf5", change_group(lambda g: g.pop("actions")), r"/episode_1: which is action\? there are .*observations/pixels"),
    ("dict_hdf5", change_group(lambda g: g.pop("observations/pixels")), r"/episode_1: which is pixels\? there are "),
    ("box_parquet", change_metadata(total_episodes=None), r"metadata.json: no total_episodes"),
    ("box_parquet", lambda f: (f / PARQUET).unlink(), r"data/1: no parquet file in it, metadata.json says 3 episodes"),
    ("box_parquet", change_bytes(PARQUET, half), r"part-0.parquet: cannot be read \("),
    ("box_parquet", change_parquet(lambda t: t.drop_columns("actions")), r"data/1: which is action\? there are observations"),
    ("dict_arrow", change_bytes("data/1/part-0.arrow", half), r"part-0.arrow: cannot be read \("),
    ("dict_arrow", change_metadata(observation_space='{"subspaces": {"pixels": {"shape": [8, 8, 3]}}}'), r"0: .*pixels: 768 numbers a row"),
]


@pytest.mark.parametrize(("name", "damage", "says"), BAD)
def test_what_is_damaged_is_one_line_and_leaves_nothing(tmp_path, source, name, damage, says):
    folder = source(name)
    damage(folder)
    with pytest.raises(DataError, match=says) as error:
        convert(folder, tmp_path / "a.h5")
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "a.h5.unfinished"}


def test_what_is_no_data_set_and_a_missing_extra(tmp_path, source, monkeypatch):
    folder = source("box_parquet")
    with pytest.raises(DataError, match=r"source: neither main_data.hdf5 nor a metadata.json of Minari in it"):
        convert(folder.parent, tmp_path / "a.h5", "--format", "minari")
    for module in ("pyarrow", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pyarrow is not installed; pip install 'aime_fast\[minari\]'"):
        convert(folder, tmp_path / "a.h5")
