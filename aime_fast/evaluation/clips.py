"""Clips of held-out episodes, and a model's prediction of one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.data import normalise

CONTEXT, HORIZON = 8, 16  # observed and predicted frames in the pictures of training
COLUMNS = 8


class PredictedClip(NamedTuple):
    """An open-loop prediction beside the truth, all on the device, frames in [-1, 1]."""

    truth: Tensor  # [F, 3, H, W]
    decoded: Tensor  # [F, 3, H, W], reconstructions of the observed frames, then predictions
    observed: int  # number of observed frames
    first: int  # index in the episode of the clip's first frame


@torch.no_grad()
def predict_clip(
    model: nn.Module, episode: TensorDict, context: int = CONTEXT, horizon: int = HORIZON, first: int | None = None
) -> PredictedClip:
    """A model's prediction of `horizon` frames of an episode from the `context` frames before them and the actions.

    Args:
        model: in eval mode.
        episode: `pixels` uint8 [T, 3, H, W], `action` [T, A], on the model's device; a short one gets less of both.
        first: index of the clip's first frame; None places the clip in the middle.

    Raises:
        ValueError: the episode has fewer than two frames.
    """
    length = len(episode["pixels"])
    frames = min(context + horizon, length)
    if frames < 2:
        raise ValueError(f"predict_clip: the episode has {length} frame, expected at least 2")
    observed = max(1, min(context, frames * context // (context + horizon)))
    first = (length - frames) // 2 if first is None else min(first, length - frames)
    clip = episode[first : first + frames]
    video, action = normalise(clip["pixels"]).unsqueeze(0), clip["action"].unsqueeze(0)
    past = model.reconstruct(video[:, :observed], action[:, :observed])
    future = model.predict_future(video[:, :observed], action[:, :observed], action[:, observed:])["reconstructions"]
    return PredictedClip(video[0], torch.cat([past.float(), future.float()], 1)[0], observed, first)


@torch.no_grad()
def infer_episode(model: nn.Module, episode: TensorDict, frames: int) -> TensorDict:
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


def strip_columns(clip: PredictedClip, columns: int = COLUMNS) -> list[int]:
    """Indices of the frames of a filmstrip: the last observed one, then predicted ones, evenly spaced."""
    return [clip.observed - 1, *(clip.observed + i for i in spread(columns - 1, len(clip.truth) - clip.observed))]


@dataclass(frozen=True)
class Clips:
    """Clips of F = context + horizon frames, cut from whole episodes, episode by episode."""

    pixels: Tensor  # uint8 [N, F, 3, H, W]
    actions: Tensor  # [N, F, A]
    context: int
    episodes: Tensor  # int64 [N], which episode each clip is of
    positions: Tensor | None = None  # [N, F, n, 2], pixels
    rewards: Tensor | None = None  # [N, F], of each action

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def horizon(self) -> int:
        """Predicted frames of a clip."""
        return self.pixels.shape[1] - self.context

    def __getitem__(self, rows: slice) -> Clips:
        positions, rewards = (None if x is None else x[rows] for x in (self.positions, self.rewards))
        return Clips(self.pixels[rows], self.actions[rows], self.context, self.episodes[rows], positions, rewards)

    def to(self, device: torch.device) -> Clips:
        """The clips on a device."""
        positions, rewards = (None if x is None else x.to(device) for x in (self.positions, self.rewards))
        return Clips(self.pixels.to(device), self.actions.to(device), self.context, self.episodes, positions, rewards)


def cut_clips(episodes: Iterable[TensorDict], context: int, horizon: int, per_episode: int) -> Clips:
    """Up to `per_episode` clips from each episode, the first at its start, the last at its end, the others evenly between.

    Clips overlap where an episode is too short for that many side by side.

    Args: episodes with `pixels` uint8 [T, 3, H, W], `action` [T, A] and, all or none, `positions` [T, n, 2], `reward` [T, 1].

    Raises ValueError: context or horizon below 1, or every episode is shorter than a clip.
    """
    if context < 1 or horizon < 1 or per_episode < 1:
        raise ValueError(f"--context {context}, --horizon {horizon}, --clips {per_episode}: each must be at least 1")
    frames, longest, clips, owners = context + horizon, 0, [], []
    for number, episode in enumerate(episodes):
        length = episode.shape[0]
        longest = max(longest, length)
        count = min(per_episode, length - frames + 1)
        for i in range(count):
            first = round(i * (length - frames) / max(count - 1, 1))
            owners.append(number)
            clips.append(episode[first : first + frames].select("pixels", "action", "positions", "reward", strict=False).clone())
    if not clips:
        raise ValueError(f"--context {context} --horizon {horizon}: the longest held-out episode has {longest} frames, ask for fewer")
    cut = torch.stack(clips)
    positions, rewards = cut.get("positions", None), cut.get("reward", None)
    rewards = None if rewards is None else rewards.squeeze(-1)
    return Clips(cut["pixels"], cut["action"], context, torch.tensor(owners), positions, rewards)
