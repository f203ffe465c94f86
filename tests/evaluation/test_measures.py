"""Measures against TorchMetrics, against closed forms, and on cases built to be right and wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from aime_fast.evaluation.measures import MAX_PSNR, Calibration, Reconstruction, prior_ranks, psnr, squared_error, ssim
from aime_fast.evaluation.positions import PositionReader, position_errors


@pytest.mark.parametrize("size", [64, 33])
def test_psnr_and_ssim_are_those_of_torchmetrics(size):
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 3, 3, size, size, generator=generator) * 2 - 1
    decoded = truth + 0.3 * torch.randn(truth.shape, generator=generator)
    clamped = decoded.clamp(-1, 1)
    theirs = structural_similarity_index_measure(clamped.flatten(0, 1), truth.flatten(0, 1), data_range=2.0, reduction="none")
    torch.testing.assert_close(ssim(decoded, truth).flatten(), theirs, atol=1e-5, rtol=1e-5)
    expected = peak_signal_noise_ratio(clamped, truth, data_range=2.0).item()
    assert psnr(squared_error(decoded, truth).mean().item()) == pytest.approx(expected, abs=1e-4)


def test_equal_frames_reach_the_cap():
    frames = torch.rand(4, 3, 16, 16) * 2 - 1
    assert psnr(squared_error(frames, frames).mean().item()) == MAX_PSNR
    torch.testing.assert_close(ssim(frames, frames), torch.ones(4))
    assert psnr(squared_error(frames + 1 / 255, frames).mean().item()) < MAX_PSNR


def outputs_like(video: torch.Tensor, codes: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"reconstructions": video * 0.9, "tokens": codes, "mixture_weights": weights}


def test_reconstruction_pools_over_batches_and_tells_one_component_from_many():
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(4, 3, 3, 16, 16, generator=generator) * 2 - 1
    codes = torch.randint(0, 4, (4, 3, 2, 2, 2), generator=generator)  # 4 of 8 codes
    alternating = torch.eye(4)[torch.arange(12) % 2].view(4, 3, 4)  # surely the first, surely the second, ...

    def measure(weights: torch.Tensor, *cuts: int) -> dict[str, float]:
        measured = Reconstruction(torch.zeros(3, 16, 16), 8)
        for x in zip(*(t.tensor_split(cuts) for t in (video, codes, weights))):
            measured.update(outputs_like(*x), x[0])
        return measured.compute()

    whole, parts = measure(alternating), measure(alternating, 1, 3)
    assert parts == pytest.approx(whole)
    assert whole["psnr"] == pytest.approx(psnr(0.01 * video.square().mean().item()), abs=1e-4)
    assert whole["psnr_mean_frame"] == pytest.approx(psnr(video.square().mean().item()), abs=1e-4)
    assert (whole["code_usage"], whole["components_used"]) == (0.5, 2)
    assert whole["effective_components"] == pytest.approx(2)
    assert whole["effective_components_per_frame"] == pytest.approx(1)
    assert measure(torch.eye(4)[torch.zeros(12, dtype=torch.long)].view(4, 3, 4))["effective_components"] == pytest.approx(1)
    with pytest.raises(ValueError, match="--validation-fraction"):
        Reconstruction(torch.zeros(3, 16, 16), 8).compute()


def histogram(shift: float, spread: float) -> tuple[list[float], float]:
    """Calibration where the true latent is a draw of the prior, moved and scaled."""
    torch.manual_seed(0)
    frames, components, width = 2000, 3, 4
    weights = torch.softmax(torch.randn(1, frames, components), -1)
    means, logvars = torch.randn(1, frames, components, width) * 2, torch.randn(1, frames, components, width)
    chosen = torch.distributions.Categorical(weights).sample()[..., None, None].expand(-1, -1, 1, width)
    mean, std = means.gather(2, chosen)[:, :, 0], (0.5 * logvars.gather(2, chosen)[:, :, 0]).exp()
    z = mean + std * (shift + spread * torch.randn(1, frames, width))
    outputs = {
        "mixture_weights": weights, "component_means": means, "component_logvars": logvars,
        "posterior_mean": z, "posterior_logvar": torch.full_like(z, -40.0),
    }  # fmt: skip
    calibration = Calibration()
    calibration.update(outputs, torch.zeros(1, frames, dtype=torch.bool))
    result = calibration.compute()
    assert result["frames"] == frames
    return result["rank_histogram"], result["log_prob_difference"]


def test_a_prior_that_is_the_truth_is_calibrated():
    shares, difference = histogram(0.0, 1.0)
    assert sum(shares) == pytest.approx(1)
    assert all(abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 2000) for share in shares)
    assert abs(difference) < 0.2


def test_a_shifted_prior_and_one_too_wide_are_told_apart():
    shares, difference = histogram(1.5, 1.0)  # the truth lies where the prior does not expect it
    assert shares[0] > 0.3
    assert difference < -1
    shares, difference = histogram(0.0, 0.3)  # the truth lies nearer to the modes than the prior's own samples
    assert shares[-1] > 0.3
    assert difference > 1


def test_frames_without_one_before_them_are_left_out():
    outputs = {name: torch.zeros(1, 3, 2, 4) for name in ("component_means", "component_logvars")}
    outputs |= {name: torch.zeros(1, 3, 4) for name in ("posterior_mean", "posterior_logvar")} | {
        "mixture_weights": torch.full((1, 3, 2), 0.5)
    }
    calibration = Calibration()
    calibration.update(outputs, torch.tensor([[[True], [False], [False]]]))
    assert calibration.compute()["frames"] == 2
    ranks, _ = prior_ranks(torch.full((1, 4), 50.0), torch.zeros(1, 1), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    assert ranks.item() == 0
    with pytest.raises(ValueError, match="--sequence-length"):
        Calibration().compute()


def dots(columns: torch.Tensor) -> torch.Tensor:
    """uint8 [M, 3, 24, 24]: a bright column of pixels at each of `columns`."""
    pixels = torch.zeros(len(columns), 3, 24, 24, dtype=torch.uint8)
    pixels[torch.arange(len(columns)), :, 8:16, columns] = 255
    return pixels


def test_positions_are_read_from_the_nearest_frames():
    known = torch.arange(0, 24, 2)
    positions = torch.stack([known.float(), torch.full((12,), 12.0)], -1)[:, None]  # [12, 1, 2]
    reader = PositionReader(dots(known), positions, ["dot"], neighbours=1)
    frames = dots(torch.tensor([4, 10, 18])).float() / 127.5 - 1
    assert reader(frames[None])[0, :, 0, 0].tolist() == [4, 10, 18]
    between = PositionReader(dots(known), positions, ["dot"], neighbours=2)
    assert between(dots(torch.tensor([7]))[None].float() / 127.5 - 1)[0, 0, 0, 0].item() == 7

    truth = torch.tensor([[[[7.0, 12.0]], [[-9.0, 12.0]]]])  # the second lies outside the picture
    errors = position_errors(reader(frames[None, :2]), truth, 24)
    assert errors[0, 0].item() == 3
    assert errors[0, 1].isnan()
