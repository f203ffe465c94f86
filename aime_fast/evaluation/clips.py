"""What a model makes of one held-out episode, for the pictures of a run and of its report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.training.pictures import attention_sheet, filmstrip, prediction_frames, save_samples, write_png, write_video

CONTEXT, HORIZON = 8, 16  # frames shown and predicted in the pictures of training: the convention of the evaluation
COLUMNS = 8


class Clip(NamedTuple):
    """An open-loop prediction beside the truth, all on the device, frames in [-1, 1]."""

    truth: Tensor  # [F, 3, H, W]
    drawn: Tensor  # [F, 3, H, W], reconstructions of the frames shown, then predictions
    shown: int
    first: int  # index in the episode of the clip's first frame


@torch.no_grad()
def predict_clip(model: nn.Module, episode: TensorDict, context: int = CONTEXT, horizon: int = HORIZON, first: int | None = None) -> Clip:
    """Shows a model `context` frames of an episode and has it predict the next `horizon` from the actions.

    Args:
        model: in eval mode.
        episode: `pixels` uint8 [T, 3, H, W], `action` [T, A], on the model's device; a short one gets less of both.
        first: where the clip begins; none: so that it lies in the middle.

    Raises:
        ValueError: the episode has fewer than two frames.
    """
    length = len(episode["pixels"])
    frames = min(context + horizon, length)
    if frames < 2:
        raise ValueError(f"predict_clip: the episode has {length} frame, expected at least 2")
    shown = max(1, min(context, frames * context // (context + horizon)))
    first = (length - frames) // 2 if first is None else min(first, length - frames)
    clip = episode[first : first + frames]
    video, action = normalise(clip["pixels"]).unsqueeze(0), clip["action"].unsqueeze(0)
    seen = model.reconstruct(video[:, :shown], action[:, :shown])
    future = model.predict_future(video[:, :shown], action[:, :shown], action[:, shown:])["reconstructions"]
    return Clip(video[0], torch.cat([seen.float(), future.float()], 1)[0], shown, first)


@torch.no_grad()
def look_at(model: nn.Module, episode: TensorDict, frames: int) -> TensorDict:
    """`forward_sequence` of an episode's first frames in one sequence, in eval mode; outputs without the batch axis, [T, ...].

    Returns: `video` [T, 3, H, W] in [-1, 1] and those of `forward_sequence` that have an axis for frames.
    """
    part = episode[:frames]
    video = normalise(part["pixels"]).unsqueeze(0)
    out = model.forward_sequence(video, part["action"].unsqueeze(0), part["is_init"].unsqueeze(0))
    return TensorDict({"video": video[0], **{name: value[0] for name, value in out.items() if value.dim() > 1}}, batch_size=[len(part)])


def spread(count: int, length: int) -> list[int]:
    """Up to `count` different indices, evenly spaced from 0 to length - 1."""
    count = min(count, length)
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]


def strip_columns(clip: Clip, columns: int = COLUMNS) -> list[int]:
    """The frames of a clip to show in a filmstrip: the last one the model saw, then predicted ones, evenly spaced."""
    return [clip.shown - 1, *(clip.shown + i for i in spread(columns - 1, len(clip.truth) - clip.shown))]


def draw_samples(model: nn.Module, episode: TensorDict, folder: Path, step: int) -> dict[str, Path]:
    """Write the pictures of a training step: reconstruction, open-loop filmstrip and attention, each as a PNG.

    Args:
        model: in eval mode. episode: as for `predict_clip`, with `is_init`. folder: where `step_<step>[_<name>].png` go.

    Returns:
        The files by name: samples, open_loop, attention.
    """
    paths = {name: folder / f"step_{step:08d}{suffix}.png" for name, suffix in (("samples", ""), ("open_loop", "_open_loop"))}
    paths["attention"] = folder / f"step_{step:08d}_attention.png"
    out = look_at(model, episode, COLUMNS)
    save_samples(paths["samples"], out["video"], out["reconstructions"], out["attention"])
    clip = predict_clip(model, episode)
    columns = strip_columns(clip)
    write_png(paths["open_loop"], filmstrip(clip.truth[columns], clip.drawn[columns], shown=1))
    write_png(paths["attention"], attention_sheet(out["video"], out["attention"], out["slot_maps"]))
    return paths


def draw_prediction(
    model: nn.Module, episodes: Iterable[TensorDict], path: Path, device: torch.device, context: int = CONTEXT, horizon: int = HORIZON
) -> None:
    """Write a video of whole episodes' middle parts: truth | reconstruction, then open-loop prediction | error.

    Args:
        model: in eval mode.
        episodes: as for `predict_clip`, on any device; those of fewer than two frames are left out.
        path: mp4 to write.
        device: where the model is.
        context: frames the model sees; horizon: frames it predicts from the actions alone.

    Raises:
        ValueError: no episode has two frames.
    """
    clips = (
        predict_clip(model, episode.select("pixels", "action").to(device), context, horizon) for episode in episodes if len(episode) > 1
    )
    films = [prediction_frames(clip.truth, clip.drawn, clip.shown) for clip in clips]
    if not films:
        raise ValueError("prediction video: every held-out episode has fewer than two frames")
    write_video(path, torch.cat(films))
