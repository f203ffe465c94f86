"""Clips, and the pictures of a training step, of the debug model."""

from __future__ import annotations

import torch
from PIL import Image

from aime_fast.data import SyntheticEpisodes
from aime_fast.evaluation.clips import predict_clip, spread, strip_columns
from aime_fast.evaluation.pictures import write_samples


def make_episode(model):
    episode = SyntheticEpisodes(1, model.image_size, seed=0).read_episode(0)
    episode["action"] = episode["action"].double()
    return episode


def test_a_clip_is_predicted_from_the_frames_shown_alone(model):
    episode = make_episode(model)
    clip = predict_clip(model, episode, context=3, horizon=4, first=10)
    assert (len(clip.truth), len(clip.decoded), clip.observed, clip.first) == (7, 7, 3, 10)
    episode["pixels"][13:] = 0  # later frames
    again = predict_clip(model, episode, context=3, horizon=4, first=10)
    assert torch.equal(clip.decoded, again.decoded)
    assert not torch.equal(clip.truth, again.truth)


def test_a_short_episode_gets_a_short_clip(model):
    clip = predict_clip(model, make_episode(model)[:3], context=8, horizon=16)
    assert (len(clip.truth), clip.observed) == (3, 1)
    assert strip_columns(clip, 8) == [0, 1, 2]


def test_spread_reaches_both_ends():
    assert spread(4, 10) == [0, 3, 6, 9]
    assert spread(5, 3) == [0, 1, 2]
    assert spread(1, 3) == [0]


def test_samples_are_three_pictures(model, tmp_path):
    paths = write_samples(model, make_episode(model), tmp_path, 7)
    sizes = {name: Image.open(path).size for name, path in paths.items()}
    columns, cell = 8, 96 + 2
    slots = 3
    assert sizes == {
        "samples": (columns * cell, 4 * cell),
        "open_loop": (columns * cell, 3 * cell),
        "attention": (columns * cell, (2 + slots) * cell),
    }
    assert paths["samples"].name == "step_00000007.png"
