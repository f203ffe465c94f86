"""Pictures hold the frames they are given."""

from __future__ import annotations

import errno
import resource
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aime_fast.evaluation import pictures


@settings(deadline=None, max_examples=20)
@given(pixels=st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda hw: arrays("uint8", (*hw, 3))))
def test_png_reads_back_as_written(pixels, tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("png") / "x.png"
    pictures.write_png(path, torch.from_numpy(pixels))
    assert Image.open(path).tobytes() == pixels.tobytes()


def test_overlay_shows_where_attention_is_and_nothing_where_it_is_even():
    frames = torch.zeros(2, 3, 8, 8)
    attention = torch.full((2, 2, 2), 0.25)
    attention[1] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    even, peaked = pictures.overlay(frames, attention)
    assert even.std() == 0
    assert peaked[0, 0, 0] - peaked[2, 0, 0] > 0.5  # red in the corner looked at
    assert peaked[:, -1, -1].std() == 0


def test_prediction_frames_mark_observed_and_predicted_frames():
    truth, decoded = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    film = pictures.prediction_frames(truth, decoded, context=2, smallest=16)  # [3, 16, 48, 3]
    assert film.shape == (3, 16, 48, 3)
    assert [tuple(frame[0, 16].tolist()) for frame in film] == [pictures.GREEN, pictures.GREEN, pictures.RED]
    assert film[0, 8, 8].tolist() == [128] * 3  # truth
    assert film[0, 8, 24].tolist() == film[0, 8, 40].tolist() == [255] * 3  # decoded, and an error of 1


def test_filmstrip_has_a_column_a_frame_and_marks_predicted_frames():
    truth, decoded = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    strip = pictures.filmstrip(truth, decoded, observed=1, smallest=16)
    cell = 16 + pictures.GAP
    assert strip.shape == (3 * cell, 3 * cell, 3)
    assert [tuple(strip[cell, i * cell].tolist()) for i in range(3)] == [pictures.GREEN, pictures.RED, pictures.RED]
    assert [strip[row * cell + 8, 8].tolist() for row in range(3)] == [[128] * 3, [255] * 3, [255] * 3]  # truth, prediction, error


def test_attention_sheet_has_a_row_for_each_slot():
    frames, maps = torch.zeros(2, 3, 8, 8), torch.full((2, 4, 2, 2), 0.25)
    maps[0, 3] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    image = pictures.attention_sheet(frames, maps.mean(1), maps, smallest=8)
    cell = 8 + pictures.GAP
    assert image.shape == (6 * cell, 2 * cell, 3)
    red = image[5 * cell, 0].int()  # slot 4 of frame 0, where it looks
    assert red[0] - red[2] > 64
    assert image[4 * cell, 0].unique().numel() == 1  # slot 3 looks everywhere alike


def test_pictures_and_films_are_whole_or_absent(tmp_path):
    frames = torch.randint(0, 256, (5, 16, 18, 3), dtype=torch.uint8)
    pictures.write_video(tmp_path / "film.mp4", frames)
    pictures.write_png(tmp_path / "still.png", frames[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "still.png"]
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as a full disk: ffmpeg, another process, writes nothing and says little
    try:
        with pytest.raises(OSError, match=r"film\.mp4") as raised:
            pictures.write_video(tmp_path / "film.mp4", frames)
        assert raised.value.errno == errno.EFBIG  # so that the remedy is the right one
        with pytest.raises(OSError, match="still"):
            pictures.write_png(tmp_path / "still.png", frames[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_a_video_is_an_mp4_of_its_frames(tmp_path):
    import imageio_ffmpeg

    pictures.write_video(tmp_path / "a.mp4", torch.randint(0, 256, (7, 33, 35, 3), dtype=torch.uint8))
    facts = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
    assert (facts["source_size"], facts["fps"], facts["codec"]) == ((36, 34), 6.0, "h264")
    assert imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))[0] == 7
