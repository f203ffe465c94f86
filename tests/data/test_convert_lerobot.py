"""LeRobot data sets, written by pyarrow and ffmpeg in the layout of v2 and v3: the very episodes, or one clear line and no file."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_convert import assert_same, convert

from aime_fast.data.foreign import Names, read
from aime_fast.errors import DataError

RATE = 30
CAMERA = "observation.images.top"
V2 = ("data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
      "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")  # fmt: skip
V3 = ("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
ROWS, FILMS = (0, 0, 1), (0, 1, 1)  # v3: the file of each episode


@pytest.fixture(scope="module")
def recorded(episodes) -> list[dict[str, np.ndarray]]:
    """Episodes of different lengths, with two actions."""
    return [
        {"pixels": e["pixels"][:n], "action": np.stack([e["action"][:n, 0], -e["action"][:n, 0] / 2], 1), "reward": e["reward"][:n]}
        for e, n in zip(episodes, (20, 13, 17))
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory, recorded) -> Callable[[str, bool], Path]:
    """Writes a data set once."""
    made: dict[tuple[str, bool], Path] = {}

    def write(version: str, filmed: bool) -> Path:
        if (version, filmed) not in made:
            made[version, filmed] = write_dataset(tmp_path_factory.mktemp("lerobot") / "pusht", recorded, version, filmed)
        return made[version, filmed]

    return write


def write_film(path: Path, frames: np.ndarray, rate: int = RATE) -> None:
    """Without loss, with frames that depend on later ones, and far between key frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(
        str(path), (16, 16), fps=rate, codec="libx264rgb", pix_fmt_out="rgb24", quality=None, output_params=["-qp", "0", "-bf", "2"]
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def join_films(path: Path, films: list[Path]) -> None:
    """One film after the other, not encoded anew, as LeRobot does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = path.with_suffix(".txt")
    listed.write_text("".join(f"file '{film}'\n" for film in films))
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([ffmpeg, "-v", "error", "-f", "concat", "-safe", "0", "-i", listed, "-c", "copy", path], check=True)
    listed.unlink()


def rows_of(episode: dict[str, np.ndarray], number: int, start: int, filmed: bool) -> pa.Table:
    frames = np.arange(len(episode["action"]))
    columns = {
        "action": pa.array(list(episode["action"]), pa.list_(pa.float32(), 2)), "next.reward": episode["reward"].astype(np.float32),
        "next.done": frames == len(frames) - 1, "timestamp": (frames / RATE).astype(np.float32), "frame_index": frames,
        "episode_index": np.full(len(frames), number), "index": start + frames, "task_index": np.zeros(len(frames), int),
    }  # fmt: skip
    if not filmed:
        cells = []
        for t, frame in enumerate(episode["pixels"]):
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "PNG")
            cells.append({"bytes": file.getvalue(), "path": f"frame_{t:06d}.png"})
        columns[CAMERA] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def write_dataset(folder: Path, episodes: list[dict[str, np.ndarray]], version: str, filmed: bool) -> Path:
    (folder / "meta").mkdir(parents=True)
    lengths = [len(e["action"]) for e in episodes]
    starts = np.cumsum([0, *lengths]).tolist()
    tables = [rows_of(e, i, starts[i], filmed) for i, e in enumerate(episodes)]
    scalar = {name: {"dtype": str(tables[0].schema.field(name).type), "shape": [1]} for name in tables[0].column_names}
    features = scalar | {
        "action": {"dtype": "float32", "shape": [2], "names": ["left", "right"]},
        CAMERA: {"dtype": "video" if filmed else "image", "shape": [16, 16, 3], "names": ["height", "width", "channels"]},
        "observation.depth": {"dtype": "video", "shape": [16, 16, 1], "info": {"video.is_depth_map": True}},
    }
    data_path, video_path = V2 if version < "v3" else V3
    info = {
        "codebase_version": version, "fps": RATE, "total_episodes": len(episodes), "total_frames": starts[-1], "chunks_size": 2,
        "data_path": data_path, "video_path": video_path, "features": features,
    }  # fmt: skip
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    singles = [folder / V2[1].format(video_key=CAMERA, episode_chunk=i // 2, episode_index=i) for i in range(len(episodes))]
    if filmed:
        for path, e in zip(singles, episodes):
            write_film(path, e["pixels"])
    if version < "v3":
        lines = [json.dumps({"episode_index": i, "tasks": ["push"], "length": n}) for i, n in enumerate(lengths)]
        (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
        for i, table in enumerate(tables):
            write_table(folder / data_path.format(episode_chunk=i // 2, episode_index=i), table)
        return folder
    meta = {
        "episode_index": range(len(episodes)), "length": lengths, "dataset_from_index": starts[:-1], "dataset_to_index": starts[1:],
        "data/chunk_index": [0] * len(episodes), "data/file_index": ROWS,
    }  # fmt: skip
    for file in sorted(set(ROWS)):
        joined = pa.concat_tables(table for table, f in zip(tables, ROWS) if f == file)
        write_table(folder / data_path.format(chunk_index=0, file_index=file), joined)
    if filmed:
        begins = [sum(n for n, f in zip(lengths[:i], FILMS) if f == FILMS[i]) / RATE for i in range(len(lengths))]
        of = {"chunk_index": [0] * len(episodes), "file_index": FILMS, "from_timestamp": begins}
        meta |= {f"videos/{CAMERA}/{key}": values for key, values in of.items()}
        for file in sorted(set(FILMS)):
            path = folder / video_path.format(video_key=CAMERA, chunk_index=0, file_index=file)
            join_films(path, [film for film, f in zip(singles, FILMS) if f == file])
        for path in singles:
            path.unlink()
    write_table(folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet", pa.table({key: list(part) for key, part in meta.items()}))
    return folder


def write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)


def change_info(folder: Path, **changes: object) -> None:
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_feature(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        features = json.loads((folder / "meta" / "info.json").read_text())["features"]
        change_info(folder, features=features | {name: features.get(name, {}) | changes})

    return change


def change_rows(change: Callable[[pa.Table], pa.Table], path: str = "data/chunk-000/episode_000001.parquet") -> Callable[[Path], None]:
    return lambda folder: write_table(folder / path, change(pq.read_table(folder / path)))


def replaced(name: str, values: Callable[[list], list]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, pa.array(values(table.column(name).to_pylist())))


def change_bytes(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def scrambled(content: bytes) -> bytes:
    """The frames of the second half of a film."""
    begin = content.index(b"mdat") + 4
    size = int.from_bytes(content[begin - 8 : begin - 4], "big") - 8
    part = slice(begin + size // 2, begin + size)
    return content[: part.start] + bytes(byte ^ 0x5A for byte in content[part]) + content[part.stop :]


@pytest.mark.parametrize("filmed", [True, False])
@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_the_very_episodes(tmp_path, written, recorded, version, filmed):
    data = convert(written(version, filmed), tmp_path / "a.h5")
    assert_same(data, recorded, slice(None))
    assert data.attributes["source_format"] == "lerobot"
    assert data.read_episode(1)["discount"][:, 0].tolist() == [1.0] * 12 + [0.0]


def test_av1(tmp_path, written, recorded):
    """LeRobot's default, with a key frame every second frame."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    if "libsvtav1" not in subprocess.run([ffmpeg, "-hide_banner", "-encoders"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("this ffmpeg writes no AV1")
    source = Path(shutil.copytree(written("v3.0", True), tmp_path / "source"))
    path = source / V3[1].format(video_key=CAMERA, chunk_index=0, file_index=1)
    coding = ["-c:v", "libsvtav1", "-g", "2", "-crf", "10", "-pix_fmt", "yuv420p", "-vf", "scale=64:64:flags=neighbor"]
    subprocess.run([ffmpeg, "-v", "error", "-i", path, *coding, tmp_path / "av1.mp4"], check=True)
    shutil.move(tmp_path / "av1.mp4", path)
    data = convert(source, tmp_path / "a.h5")
    for i in (1, 2):
        found = data.read_episode(i)["pixels"].permute(0, 2, 3, 1).numpy().astype(float)
        off = np.abs(found[:, None] - recorded[i]["pixels"][None]).mean((2, 3, 4))  # [T, T], of each frame to each recorded one
        assert off.diagonal().max() < 4
        assert (off.diagonal() <= off.min(1) + 0.3).all()


def test_pictures_beside_the_rows(tmp_path, written, recorded):
    """A cell that has a path alone."""
    source = Path(shutil.copytree(written("v2.0", False), tmp_path / "source"))
    Image.fromarray(recorded[1]["pixels"][0]).save(source / "frame_000000.png")
    change_rows(replaced(CAMERA, lambda cells: [{"bytes": None, "path": "frame_000000.png"}, *cells[1:]]))(source)
    assert_same(convert(source, tmp_path / "a.h5"), recorded, slice(None))


@pytest.mark.parametrize("filmed", [True, False])
def test_pictures_are_brought_to_the_wanted_size_as_they_are_read(written, recorded, filmed):
    found = list(read(written("v3.0", filmed), "lerobot", Names(image_size=8)))
    assert [e.pixels.shape for e in found] == [(len(e["action"]), 8, 8, 3) for e in recorded]
    for small, e in zip(found, recorded):
        assert np.abs(small.pixels - e["pixels"].reshape(-1, 8, 2, 8, 2, 3).mean((2, 4))).max() <= 1


def test_of_several_cameras_one_is_chosen(tmp_path, written, recorded):
    source = Path(shutil.copytree(written("v2.1", True), tmp_path / "source"))
    change_feature("wrist", dtype="video", shape=[16, 16, 3])(source)
    with pytest.raises(DataError, match=rf"info.json: 2 cameras, {CAMERA}, wrist; choose one with --map pixels=NAME"):
        convert(source, tmp_path / "a.h5")
    with pytest.raises(DataError, match=rf"--map pixels=top: there are {CAMERA}, observation.depth, wrist"):
        convert(source, tmp_path / "a.h5", "--map", "pixels=top")
    assert_same(convert(source, tmp_path / "a.h5", "--map", f"pixels={CAMERA}"), recorded, slice(None))


FILM = f"videos/chunk-000/{CAMERA}/episode_000001.mp4"
DATA = "data/chunk-000/episode_000001.parquet"
META = "meta/episodes/chunk-000/file-000.parquet"
PACKED = f"videos/{CAMERA}/chunk-000/file-001.mp4"
BEGIN = f"videos/{CAMERA}/from_timestamp"
ALL = "v2.1 films"  # unless another data set is named
BAD = [
    (remove("meta/info.json"), r"info.json: missing; give the folder of a LeRobot data set", ALL),
    (change_bytes("meta/info.json", half), r"info.json: cannot be read \(", ALL),
    (lambda f: change_info(f, codebase_version="v1.6"), r"codebase_version v1.6, expected v2.0 to v3", ALL),
    (lambda f: change_info(f, codebase_version="v4.0"), r"codebase_version v4.0, expected v2.0 to v3", ALL),
    (lambda f: change_info(f, storage_format="lance"), r"storage_format lance, expected parquet", "v3.0 films"),
    (lambda f: change_info(f, features={}), r"info.json: which is action", ALL),
    (change_feature(CAMERA, dtype="float32"), r"info.json: no camera in its features", ALL),
    (lambda f: change_info(f, total_episodes=4), r"3 episodes in meta, meta/info.json says 4", ALL),
    (lambda f: change_info(f, data_path="{year}"), r"info.json: data_path: cannot be read \('year'\)", ALL),
    (change_bytes("meta/episodes.jsonl", lambda c: c[:-9]), r"episodes.jsonl: line 3: cannot be read", ALL),
    (change_bytes("meta/episodes.jsonl", lambda c: c.replace(b"length", b"size")), r"episodes.jsonl: line 1: no length; there are", ALL),
    (remove("meta/episodes.jsonl"), r"episodes.jsonl: missing", ALL),
    (remove(DATA), r"000001.parquet: missing", ALL),
    (change_bytes(DATA, half), r"000001.parquet: cannot be read \(", ALL),
    (change_bytes(DATA, lambda c: c[:900] + bytes(99) + c[999:]), r"000001.parquet: .*cannot be read \(", "v2.1 pictures"),
    (change_rows(lambda t: t.slice(0, 9)), r"000001.parquet: episode 1: 9 rows, meta says 13", ALL),
    (change_rows(replaced("frame_index", lambda v: [*v[:5], 9, *v[6:]])), r"episode 1: row 5 has frame_index 9, expected 5", ALL),
    (change_rows(replaced("episode_index", lambda v: [7] * 13)), r"episode 1: 0 rows, meta says 13", ALL),
    (change_rows(lambda t: t.drop_columns("action")), r"000001.parquet: no action; there are ", ALL),
    (change_rows(replaced("action", lambda v: [*v[:4], [1.0], *v[5:]])), r"action: row 4 has shape \[1\], .* says \[2\]", ALL),
    (change_rows(replaced("action", lambda v: [*v[:4], [1.0, None], *v[5:]])), r"row 4 is \[1.0, None\], expected numbers", ALL),
    (change_rows(replaced("action", lambda v: [*v[:4], [1.0, 5.0], *v[5:]])), r"action 1 of row 4 is 5.* outside \[-1, 1\]", ALL),
    (remove(FILM), r"episode 1: its film .*000001.mp4 is missing", ALL),
    (change_bytes(FILM, half), r"episode 1: 0 frames .*000001.mp4 from second 0 \(moov atom not found\), expected 13, 30 a second", ALL),
    (change_bytes(FILM, scrambled), r"episode 1: \d+ frames can be read in .*000001.mp4 from second 0 \(.*\), expected 13, 30", ALL),
    (lambda f: write_film(f / FILM, np.zeros((12, 16, 16, 3), np.uint8)), r"episode 1: 12 frames .* expected 13", ALL),
    (lambda f: write_film(f / FILM, np.zeros((90, 16, 16, 3), np.uint8), 60), r"episode 1: 2[56] frames .* expected 13", ALL),
    (change_rows(replaced(CAMERA, lambda v: [{"bytes": half(v[0]["bytes"])}, *v[1:]])), r"top: picture 0: cannot be", "v2.1 pictures"),
    (change_rows(replaced(CAMERA, lambda v: [{"bytes": None}, *v[1:]])), r"episode 1: .*top of row 0: .* expected a", "v2.1 pictures"),
    (remove(META), r"episodes: no parquet file in it", "v3.0 films"),
    (change_bytes(META, half), r"file-000.parquet: cannot be read", "v3.0 films"),
    (change_rows(lambda t: t.drop_columns(BEGIN), META), r"file-000.parquet: no videos/.*/from_timestamp; there are", "v3.0 films"),
    (change_rows(replaced(BEGIN, lambda v: [*v[:2], None]), META), r"episode 2: no videos/.*/from_timestamp", "v3.0 films"),
    (change_rows(replaced(BEGIN, lambda v: [*v[:2], 0.9]), META), r"episode 2: 3 frames .* from second 0.9, expected 17", "v3.0 films"),
    (change_bytes(PACKED, scrambled), r"episode [12]: \d+ frames can be read in .*file-001.mp4", "v3.0 films"),
]


@pytest.mark.parametrize(("damage", "says", "of"), BAD)
def test_what_is_damaged_is_one_line_and_leaves_nothing(tmp_path, written, damage, says, of):
    version, kind = of.split()
    source = Path(shutil.copytree(written(version, kind == "films"), tmp_path / "source"))
    damage(source)
    with pytest.raises(DataError, match=says) as error:
        convert(source, tmp_path / "a.h5")
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "a.h5.unfinished"}


def test_without_pyarrow_the_extra_is_named(tmp_path, written, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pyarrow is not installed; pip install 'aime_fast\[lerobot\]'"):
        convert(written("v3.0", True), tmp_path / "a.h5")
