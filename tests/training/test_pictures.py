"""Pictures hold the frames they are given."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aime_fast.training import pictures


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


def test_prediction_frames_mark_what_was_seen_and_what_was_made_up():
    truth, drawn = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    film = pictures.prediction_frames(truth, drawn, context=2, smallest=16)  # [3, 16, 48, 3]
    assert film.shape == (3, 16, 48, 3)
    assert [tuple(frame[0, 16].tolist()) for frame in film] == [pictures.GREEN, pictures.GREEN, pictures.RED]
    assert film[0, 8, 8].tolist() == [128] * 3  # truth
    assert film[0, 8, 24].tolist() == film[0, 8, 40].tolist() == [255] * 3  # drawn, and an error of 1
