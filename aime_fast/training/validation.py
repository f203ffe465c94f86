"""How good the averaged weights are on episodes that training never saw, in numbers and in pictures."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.training.measures import Reconstruction
from aime_fast.training.pictures import prediction_frames, write_video


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
        what `measures.Reconstruction` measures, and every loss as `loss/<name>`.

    Raises:
        ValueError: the held-out episodes give no batch.
    """
    measured = Reconstruction(mean_frame, codebook_size)
    totals: dict[str, Tensor | float] = {}
    count = 0
    for batch in islice(batches, limit):
        video = normalise(batch["pixels"])  # [B, T, 3, H, W]
        outputs = model.forward_sequence(video, batch["action"], batch["is_init"])
        measured.update(outputs, video)
        for name, value in losses.compute_losses(outputs)[0].items():
            totals[name] = totals.get(name, 0.0) + value.float() * len(video)
        count += len(video)
    return measured.compute() | {f"loss/{name}": float(total) / count for name, total in totals.items()}


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
