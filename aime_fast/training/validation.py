"""How good the averaged weights are on episodes that training never saw, in numbers and in pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.generative_prior import get_effective_components
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.training.pictures import prediction_frames, save_samples, write_video


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of frames in [-1, 1] (peak-to-peak 2) from their mean squared error."""
    return 10.0 * math.log10(4.0 / max(squared_error, 1e-12))


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[TensorDict], losses: LossAggregator, mean_frame: Tensor, codebook_size: int, limit: int
) -> dict[str, float]:
    """Losses and measures over at most `limit` held-out batches, with the model in eval mode.

    Args:
        model: in eval mode.
        batches: with `pixels` uint8 [B, T, 3, H, W], `action`, `is_init`, on the model's device.
        losses: weighs the terms; beta is that after warm-up.
        mean_frame: [3, H, W] in [-1, 1], the constant picture that any model should beat.
        codebook_size: V.
        limit: number of batches.

    Returns:
        `psnr`, `psnr_mean_frame` (dB, from the mean squared error of all frames), `code_usage` (share of the V codes of a head
        that occur, averaged over heads), `effective_components` (exp of the entropy of the mixture weights, averaged over
        frames), `components_used` (components that are the most likely one somewhere), and every loss as `loss/<name>`.
    """
    totals: dict[str, Tensor | float] = {}
    used_codes = used_components = None
    count = 0
    for batch in islice(batches, limit):
        video = normalise(batch["pixels"])  # [B, T, 3, H, W]
        outputs = model.forward_sequence(video, batch["action"], batch["is_init"])
        weights, tokens = outputs["mixture_weights"].float(), outputs["tokens"]  # [B, T, K], [B, T, Ht, Wt, Q]
        measured = {f"loss/{name}": value for name, value in losses.compute_losses(outputs)[0].items()}
        measured["squared_error"] = (outputs["reconstructions"].float() - video).square().mean()
        measured["squared_error_mean_frame"] = (mean_frame - video).square().mean()
        measured["effective_components"] = get_effective_components(weights)[1].mean()
        sequences = video.shape[0]
        for name, value in measured.items():
            totals[name] = totals.get(name, 0.0) + value.float() * sequences
        count += sequences

        if used_codes is None:
            used_codes = torch.zeros(tokens.shape[-1], codebook_size, device=video.device)  # [Q, V]
            used_components = torch.zeros(weights.shape[-1], device=video.device)  # [K]
        by_head = tokens.flatten(0, -2).T  # [Q, B*T*Ht*Wt]
        used_codes.scatter_(1, by_head, 1.0)
        used_components[weights.argmax(-1).flatten()] = 1.0
    if not count:
        raise ValueError("validation: the held-out episodes give no batch; raise --validation-fraction or lower --sequence-length")

    mean = {name: float(total) / count for name, total in totals.items()}
    return {
        "psnr": psnr(mean.pop("squared_error")),
        "psnr_mean_frame": psnr(mean.pop("squared_error_mean_frame")),
        "code_usage": float(used_codes.mean()),
        "effective_components": mean.pop("effective_components"),
        "components_used": float(used_components.sum()),
        **mean,
    }


@torch.no_grad()
def draw_samples(model: nn.Module, batch: TensorDict, path: Path, columns: int = 8) -> None:
    """Save a sheet of the first frames of the first sequence: truth, reconstruction, error, attention."""
    video = normalise(batch["pixels"][:1])  # [1, T, 3, H, W]
    outputs = model.forward_sequence(video, batch["action"][:1], batch["is_init"][:1])
    save_samples(path, video[0, :columns], outputs["reconstructions"][0, :columns], outputs["attention"][0, :columns])


@torch.no_grad()
def draw_prediction(
    model: nn.Module, episodes: Iterable[TensorDict], path: Path, device: torch.device, context: int = 8, horizon: int = 16
) -> None:
    """Write a video of whole episodes' middle parts: truth | reconstruction, then open-loop prediction | error.

    Args:
        model: in eval mode.
        episodes: each with `pixels` uint8 [T, 3, H, W], `action` [T, A]; one shorter than `context + horizon` gets less of both.
        path: mp4 to write.
        device: where the model is.
        context: frames the model sees; horizon: frames it predicts from the actions alone.
    """
    films = []
    for episode in episodes:
        frames = min(context + horizon, len(episode["pixels"]))
        shown = max(1, min(context, frames * context // (context + horizon)))
        if frames - shown < 1:
            continue
        start = (len(episode["pixels"]) - frames) // 2
        pixels, action = (episode[key][start : start + frames].to(device).unsqueeze(0) for key in ("pixels", "action"))
        video = normalise(pixels)  # [1, frames, 3, H, W]
        seen = model.reconstruct(video[:, :shown], action[:, :shown])
        future = model.predict_future(video[:, :shown], action[:, :shown], action[:, shown:])["reconstructions"]
        films.append(prediction_frames(video[0], torch.cat([seen, future], 1)[0], shown))
    if not films:
        raise ValueError("prediction video: every held-out episode has fewer than two frames")
    write_video(path, torch.cat(films))
