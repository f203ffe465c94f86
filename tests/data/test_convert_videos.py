"""Films and folders of pictures, converted: every picture with its action, or one clear line and no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from test_convert import assert_same, convert

from aime_fast.data.foreign import Names, read
from aime_fast.errors import DataError

FRAMES, SIZE = 40, 32
NONE, NO_ACTIONS = {"action": "none"}, ("--actions", "none")
CODECS = {
    "a.mp4": ("libx264", "yuv420p", []), "fast.mp4": ("libx264", "yuv420p", ["-movflags", "+faststart"]),
    "a.mkv": ("libx264", "yuv420p", []), "intra.mkv": ("libx264", "yuv420p", ["-g", "1"]), "a.mov": ("libx264", "yuv420p", []),
    "a.avi": ("mpeg4", "yuv420p", []), "a.webm": ("libvpx-vp9", "yuv420p", []), "a.gif": ("gif", "rgb8", []),
}  # fmt: skip


def moving(frames: int = FRAMES, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """uint8 [T, h, w, 3]: coarse noise that shifts, so that every frame is coded in some bytes and differs from the others."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return np.stack([np.roll(coarse.repeat(4, 0).repeat(4, 1), t, 1) for t in range(frames)])


def write_film(path: Path, frames: np.ndarray, **options) -> Path:
    codec, pixels, parameters = CODECS.get(path.name, CODECS[f"a{path.suffix}"])
    size = (frames.shape[2], frames.shape[1])
    given = {"fps": 25, "codec": codec, "pix_fmt_out": pixels, "output_params": parameters, "macro_block_size": 2} | options
    writer = imageio_ffmpeg.write_frames(str(path), size, **given)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Callable[[str], Path]:
    """Writes a film once."""
    folder = tmp_path_factory.mktemp("films")

    def write(name: str) -> Path:
        return folder / name if (folder / name).exists() else write_film(folder / name, moving())

    return write


def write_pictures(folder: Path, frames: np.ndarray, name: str = "{}.png") -> Path:
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(t))
    return folder


def refused(source: Path, out: Path, says: str, *flags: str) -> None:
    """One line, and nothing under the final name or beside it but what was finished."""
    before = {path.name for path in out.parent.iterdir()}
    with pytest.raises(DataError, match=says) as error:
        convert(source, out, *flags)
    assert "\n" not in str(error.value)
    assert {path.name for path in out.parent.iterdir()} <= before | {out.name + ".unfinished"}


def test_pictures_with_actions_beside_them(tmp_path, episodes, capsys):
    folder = tmp_path / "pictures"
    for i, e in enumerate(episodes):
        write_pictures(folder / f"ep{i}", e["pixels"], "{:03d}.png")
        np.savetxt(folder / f"ep{i}.csv", 10 * e["action"], delimiter=",")
    with pytest.raises(DataError, match=r"ep0: action 0 of row \d+ is .*, outside \[-1, 1\]; give the range .*--action-range"):
        convert(folder, tmp_path / "a.h5")
    data = convert(folder, tmp_path / "a.h5", "--action-range", "-10", "10")
    assert_same(data, episodes, slice(None), reward=False)
    assert (data.attributes["action_low"], data.attributes["action_high"]) == ((-10.0,), (10.0,))
    assert "no rewards were recorded: zeros are stored" in capsys.readouterr().out


def test_a_film(tmp_path, episodes):
    big = episodes[0]["pixels"].repeat(4, 1).repeat(4, 2)
    film = write_film(tmp_path / "film.mp4", big, pix_fmt_out="yuv444p", quality=10)
    refused(film, tmp_path / "a.h5", r"no actions beside it, expected film\.npy or film\.csv; without any pass --actions none")
    data = convert(film, tmp_path / "a.h5", *NO_ACTIONS)
    assert data.attributes["rewards"] == "none"
    found = data.read_episode(0)
    assert (found["action"] == 0).all()
    off = found["pixels"].permute(0, 2, 3, 1).float() - torch.from_numpy(episodes[0]["pixels"]).float()
    assert off.abs().mean() < 4


@pytest.mark.parametrize("name", CODECS)
def test_every_frame_of_a_whole_film_is_read(film, name):
    (episode,) = read(film(name), "videos", Names(NONE))
    assert len(episode.pixels) == FRAMES
    off = np.abs(episode.pixels[:, None].astype(float) - moving()[None]).mean((2, 3, 4))  # [T, T], of each frame to each written one
    assert (off.argmin(1) == np.arange(FRAMES) % SIZE).all()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def scrambled(content: bytes) -> bytes:
    """From the middle on, but for the last tenth, where tables lie."""
    part = slice(len(content) // 2, len(content) * 9 // 10)
    return content[: part.start] + bytes(byte ^ 0x5A for byte in content[part]) + content[part.stop :]


@pytest.mark.parametrize("damage", [half, scrambled])
@pytest.mark.parametrize("name", CODECS)
def test_a_damaged_film_is_one_line_that_names_it(tmp_path, film, name, damage):
    path = tmp_path / name
    path.write_bytes(damage(film(name).read_bytes()))
    refused(path, tmp_path / "out.h5", rf"{name}: \d+ frames can be read.* \(.*\); copy it again, or leave it out", *NO_ACTIONS)


def test_a_film_shorter_than_its_container_says(tmp_path, film):
    """Where nothing but the count is wrong: the film ends between two blocks, and no frame is damaged."""
    content = film("intra.mkv").read_bytes()
    ends = [at for at in range(len(content) // 2, len(content) - 8) if content[at] == 0xA3]  # SimpleBlock
    found = []
    for at in ends:
        path = tmp_path / "a.mkv"
        path.write_bytes(content[:at])
        with pytest.raises(DataError) as error:
            list(read(path, "videos", Names(NONE)))
        found.append(str(error.value))
    assert found
    assert all("frames can be read of about 40, " in line and " of 1.60 seconds (" in line for line in found), found


def test_frames_of_uneven_durations_are_those_of_the_film(tmp_path):
    pictures = [Image.fromarray(frame) for frame in moving(5)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[50, 200, 400, 30, 1000])
    np.save(tmp_path / "a.npy", np.linspace(-1, 1, 5))
    found = convert(tmp_path / "a.gif", tmp_path / "a.h5").read_episode(0)
    assert found["action"][:, 0].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]


def test_numbers_in_names_are_put_in_order_by_their_value(tmp_path):
    """Of pictures, of folders of them, and of films."""
    for episode in (2, 10, 1):
        grey = (20 * episode + np.arange(12)).astype(np.uint8)
        write_pictures(tmp_path / "pictures" / f"run{episode}", np.broadcast_to(grey[:, None, None, None], (12, 16, 16, 3)))
    data = convert(tmp_path / "pictures", tmp_path / "a.h5", *NO_ACTIONS)
    assert [data.read_episode(i)["pixels"][:, 0, 0, 0].tolist() for i in range(3)] == [[20 * e + t for t in range(12)] for e in (1, 2, 10)]
    (tmp_path / "films").mkdir()
    for episode in (2, 10, 1):
        write_film(tmp_path / "films" / f"{episode}.mkv", moving(episode + 3))
    assert convert(tmp_path / "films", tmp_path / "b.h5", *NO_ACTIONS).lengths == [4, 5, 13]


@pytest.mark.parametrize("film", [True, False])
def test_what_follows_a_dot_in_a_name_belongs_to_it(tmp_path, film):
    source = tmp_path / "source"
    source.mkdir()
    for i, value in enumerate((-0.5, 0.25)):
        frames = moving(4, 16, 16)
        write_film(source / f"run.{i}.mp4", frames) if film else write_pictures(source / f"run.{i}", frames)
        np.save(source / f"run.{i}.npy", np.full((4, 1), value))
        np.save(source / f"run.{i}.reward.npy", np.full(4, 2 * value))
    np.save(source / "run.npy", np.ones((4, 1)))
    data = convert(source, tmp_path / "a.h5")
    assert [data.read_episode(i)["action"].unique().tolist() for i in range(2)] == [[-0.5], [0.25]]
    assert [data.read_episode(i)["reward"].unique().tolist() for i in range(2)] == [[-1.0], [0.5]]


def test_pictures_are_brought_to_the_wanted_size_as_they_are_read(tmp_path):
    write_film(tmp_path / "a.mkv", moving(100, 48, 64))
    write_pictures(tmp_path / "pictures", moving(100, 48, 64))
    for source, shape in ((tmp_path / "a.mkv", (48, 64)), (tmp_path / "pictures", (48, 64))):
        (small,), (large,) = (read(source, "videos", Names(NONE, image_size=size)) for size in (16, None))
        assert (small.pixels.shape, large.pixels.shape) == ((100, 16, 16, 3), (100, *shape, 3))
        middle = large.pixels[:, :, 8:56].reshape(100, 16, 3, 16, 3, 3).mean((2, 4))
        assert np.abs(small.pixels - middle).max() <= 1


def truncate(path: Path) -> None:
    path.write_bytes(half(path.read_bytes()))


PICTURES = [
    (lambda f: truncate(f / "run" / "3.png"), r"run/3\.png: cannot be read \(.*\); copy it again, or leave it out"),
    (lambda f: (f / "run" / "3.png").write_bytes(b""), r"run/3\.png: cannot be read \("),
    (lambda f: Image.fromarray(moving(1, 16, 32)[0]).save(f / "run" / "3.png"), r"run/3\.png is \[16, 32, 3\], the first \[32, 32, 3\]"),
    (lambda f: (f / "run.npy").unlink(), r"run: no actions beside it, expected run\.npy or run\.csv; .* --actions none"),
    (lambda f: truncate(f / "run.npy"), r"run\.npy: cannot be read \("),
    (lambda f: np.save(f / "run.npy", np.zeros((3, 1))), r"run: 3 actions for 6 pictures, expected as many, or one less"),
    (lambda f: np.save(f / "run.npy", np.zeros((6, 1, 1))), r"run: actions have shape \[6, 1, 1\], expected \[T, A\]"),
    (lambda f: np.save(f / "run.npy", np.full(6, np.nan)), r"run: action 0 of row 0 is nan"),
    (lambda f: np.save(f / "run.npy", np.array(["left"] * 6)), r"run: actions are <U4, expected numbers"),
    (lambda f: np.save(f / "run.npy", np.array([None] * 6), allow_pickle=True), r"run\.npy: cannot be read \("),
    (lambda f: np.save(f / "run.reward.npy", np.zeros(9)), r"run: 9 rewards for 6 pictures"),
    (lambda f: ((f / "run.npy").unlink(), (f / "run.csv").write_text("0\nright\n")), r"run\.csv: cannot be read \("),
]


@pytest.mark.parametrize(("damage", "says"), PICTURES)
def test_what_is_wrong_with_pictures_or_actions_is_one_line(tmp_path, damage, says):
    write_pictures(tmp_path / "source" / "run", moving(6))
    np.save(tmp_path / "source" / "run.npy", np.zeros((6, 1)))
    damage(tmp_path / "source")
    refused(tmp_path / "source", tmp_path / "a.h5", says)


def test_what_is_wrong_with_a_film_is_one_line(tmp_path):
    film = write_film(tmp_path / "run.mp4", moving(6))
    np.save(tmp_path / "run.npy", np.zeros((9, 1)))
    refused(film, tmp_path / "a.h5", r"run\.mp4: 9 actions for 6 pictures, expected as many, or one less")
    for content in (b"", b"no film", bytes(2000)):
        film.write_bytes(content)
        refused(film, tmp_path / "a.h5", r"run\.mp4: 0 frames can be read \(.*\); copy it again, or leave it out", *NO_ACTIONS)


def test_films_before_a_damaged_one_are_kept(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(3):
        write_film(source / f"{i}.mkv", moving())
    whole = (source / "1.mkv").read_bytes()
    (source / "1.mkv").write_bytes(half(whole))
    refused(source, tmp_path / "a.h5", r"1\.mkv: \d+ frames can be read of about 40.* 1 episodes are in .*go on with --resume", *NO_ACTIONS)
    (source / "1.mkv").write_bytes(whole)
    assert convert(source, tmp_path / "a.h5", *NO_ACTIONS, "--resume").lengths == [FRAMES] * 3
