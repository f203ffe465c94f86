"""Films of models that have nothing but `predict_future`, and the share of the error near objects that they explain."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips
from aime_fast.evaluation.explained import error_near, explain_reconstruction, explained_share, lines, masks_near
from aime_fast.evaluation.films import evaluate_films
from aime_fast.evaluation.positions import PositionReader

CONTEXT, HORIZON, SIZE = 2, 20, 32
NAMES = ("cart", "pole_1", "pole_1/tip")
# PSNR at steps 1 and 10 and SSIM at step 10, of `evaluate_prediction` at commit bbc35a9 with the films of `Films`.
BEFORE = {
    "model": (7.9353578, 8.8594935, 0.012537965),
    "sample_mean": (7.4797705, 8.3799167, 0.012790491),
    "sample_best": (7.6450170, 8.5637976, 0.012726397),
    "repeat_last_frame": (7.6300185, 7.7607683, 0.012754839),
    "mean_frame": (10.7969115, 10.8454226, 0.0080084574),
}


def make_clips(count: int = 3) -> Clips:
    generator = torch.Generator().manual_seed(0)
    frames = CONTEXT + HORIZON
    pixels = torch.randint(0, 256, (count, frames, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    actions = torch.rand(count, frames, 2, generator=generator) * 2 - 1
    return Clips(pixels, actions, CONTEXT, torch.arange(count), torch.rand(count, frames, 3, 2, generator=generator) * (SIZE - 1))


class Films(nn.Module):
    """A model of another library: it has no tokens and knows nothing of the clips but what it is given."""

    def predict_future(self, observations, actions, future_actions, sample=False, seeds=None) -> dict[str, Tensor]:
        """The last frame, faded by time and actions, and by the seed of a sample."""
        fade = 1 - 0.02 * torch.arange(1, future_actions.shape[1] + 1) + 0.1 * future_actions.mean(-1).cumsum(1)
        if sample:
            fade = fade + 0.2 * torch.tensor([seed % 7 / 7 for seed in seeds])[:, None]
        return {"reconstructions": normalise(observations[:, -1:]) * fade[..., None, None, None]}


class Known(nn.Module):
    """Predicts and reconstructs given pictures [N, F, 3, H, W] of the clips; in samples, with an error of either sign that seeds choose."""

    def __init__(self, pictures: Tensor, error: float = 0.0):
        super().__init__()
        self.pictures, self.error, self.calls = pictures, error, 0

    def predict_future(self, observations, actions, future_actions, sample=False, seeds=None) -> dict[str, Tensor]:
        self.calls += sample
        shift = self.error * (-1) ** self.calls if sample else 0.0
        return {"reconstructions": self.pictures[:, CONTEXT:] + shift}

    def reconstruct(self, observations, actions) -> Tensor:
        return self.pictures


def evaluate(model: nn.Module, clips: Clips, **options) -> dict:
    reader = PositionReader(clips.pixels.flatten(0, 1), clips.positions.flatten(0, 1), NAMES, neighbours=1)
    result = evaluate_films(model, clips, normalise(clips.pixels).mean((0, 1)), **{"samples": 2, "batch": 8, "reader": reader} | options)
    return json.loads(json.dumps(result, allow_nan=False))


def test_films_are_measured_as_before_tokens_were_split_off():
    result = evaluate(Films(), make_clips(), batch=2)
    for name, (psnr_1, psnr_10, ssim_10) in BEFORE.items():
        found = result[name]["psnr"][0], result[name]["psnr"][9], result[name]["ssim"][9]
        assert found == pytest.approx((psnr_1, psnr_10, ssim_10), rel=1e-5), name
    assert result["action_shuffle_ratio"] == pytest.approx(1.0005098594, rel=1e-5)
    assert result["psnr_gain_on_better_baseline"] == pytest.approx({"steps_5_to_16": -2.0691544, "smallest": -2.8615536})
    assert result["positions"]["by_point"]["model"] == pytest.approx({"cart": 14.459229, "pole_1": 16.197552, "pole_1/tip": 18.077729})


def test_the_mean_picture_is_the_mean_of_the_samples_and_samples_are_compared_with_the_deterministic_film():
    clips = make_clips()
    half = normalise(clips.pixels) * 0.5
    result = evaluate(Known(half, error=0.25), clips, samples=2)
    assert result["mean_picture"]["psnr"] == pytest.approx(result["model"]["psnr"], rel=1e-5)  # the errors of two samples cancel
    gap = result["sampled_minus_deterministic"]
    assert gap["at_step_5"] == gap["decibels"][4] == result["sample_mean"]["psnr"][4] - result["model"]["psnr"][4]
    assert all(decibels < -0.5 for decibels in gap["decibels"])
    gain = {name: result[name] for name in ("psnr_gain_on_better_baseline", "mean_picture_psnr_gain_on_better_baseline")}
    assert gain["mean_picture_psnr_gain_on_better_baseline"] == pytest.approx(gain["psnr_gain_on_better_baseline"], rel=1e-4)
    assert not any(name.startswith("mean_picture") for name in evaluate(Known(half), clips, samples=0))


def test_the_explained_share_is_0_for_the_mean_frame_and_1_for_the_truth():
    clips = make_clips()
    truth = normalise(clips.pixels)
    mean = truth.mean((0, 1))
    for picture, share in ((mean.expand_as(truth), 0.0), (truth, 1.0), ((truth + mean) / 2, 0.75)):
        result = evaluate(Known(picture), clips)["explained_near"]
        for span in ("steps_1_to_16", "whole_horizon"):
            assert result[span]["model"] == pytest.approx(dict.fromkeys((*NAMES, "pole_1/whole"), share), abs=1e-5)
        assert result["whole_horizon"]["repeat_last_frame"]["cart"] != pytest.approx(share, abs=1e-3)
        assert explain_reconstruction(Known(picture), clips, mean, NAMES) == pytest.approx(result["whole_horizon"]["model"], abs=1e-5)


def test_steps_1_to_16_are_those_steps():
    clips = make_clips()
    truth = normalise(clips.pixels)
    pictures = truth.mean((0, 1)).expand_as(truth).clone()
    pictures[:, : CONTEXT + 16] = truth[:, : CONTEXT + 16]
    result = evaluate(Known(pictures), clips)
    near, positions = result["explained_near"], result["positions"]
    assert near["steps_1_to_16"]["model"]["cart"] == pytest.approx(1)
    assert 0.5 < near["whole_horizon"]["model"]["cart"] < 0.95
    assert positions["by_point_steps_1_to_16"]["model"]["cart"] == 0 < positions["by_point"]["model"]["cart"]


def test_only_pixels_near_a_line_count():
    ends = lines(NAMES)
    assert ends == {"cart": (0, 0), "pole_1": (1, 1), "pole_1/tip": (2, 2), "pole_1/whole": (0, 2)}
    assert lines(("a", "a/tip")) == {"a": (0, 0), "a/tip": (1, 1)}  # nothing says where it begins
    positions = torch.tensor([[[3.0, 8.0], [7.0, 8.0], [11.0, 8.0]], [[float("nan")] * 2, [-30.0, 3.0], [-1.0, 3.0]]])
    masks = masks_near(positions, list(ends.values()), SIZE)  # [2, 4, H, W]
    assert masks.sum((-2, -1)).tolist() == [[13, 13, 13, 13 + 8 * 5], [0, 0, 4, 0]]
    assert masks[0, 0, 8, 1:6].all()
    assert masks[0, 0, 6:11, 3].all()
    truth = torch.zeros(2, 3, SIZE, SIZE)
    wrong = truth.clone()
    wrong[0, :, 8, 3] = 0.5  # of the cart
    wrong[0, :, 0, 0] = 1.0  # of no line
    error = error_near(wrong, truth, masks)
    assert error[0].tolist() == [0.75, 0, 0, 0.75]
    assert explained_share(error, torch.zeros_like(error), list(ends)) == dict.fromkeys(ends)
