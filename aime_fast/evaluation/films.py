"""Films that a model predicts open-loop, measured step by step beside baselines without a model. docs/evaluation.md says what each number
means.

Convention: the model observes `context` frames and predicts `horizon` frames from actions alone. Scores are of the horizon only. Any
model will do that has

    predict_future(observations, actions, future_actions, sample, seeds) -> {"reconstructions": [N, F, 3, H, W] in [-1, 1], ...}

as `DPGMMVariationalRecurrentAutoencoder.predict_future` has it: observations uint8 [N, context, 3, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips
from aime_fast.evaluation.explained import error_near, explained_share, lines, masks_near
from aime_fast.evaluation.lpips import Lpips
from aime_fast.evaluation.measures import psnr, squared_error, ssim
from aime_fast.evaluation.positions import PositionReader, position_errors

GAIN_STEPS = range(5, 17)  # steps over which the gain on a baseline is averaged
NEAR_STEPS = 16  # steps over which positions and shares near points are given beside those over the whole horizon
SAMPLE_STEP = 5  # step at which sampled films are compared with the deterministic one
FILMS = ("model", "repeat_last_frame", "mean_frame")  # that have a row of their own without samples


def predict(
    model: nn.Module, clips: Clips, future_actions: Tensor | None = None, sample: bool = False, seeds: Sequence[int] | None = None
) -> Mapping[str, Tensor]:
    """Open-loop prediction of the horizon of each clip, with its own actions or with `future_actions` [N, horizon, A].

    `sample` and `seeds` as in `predict_future`.
    """
    c = clips.context
    future_actions = clips.actions[:, c:] if future_actions is None else future_actions
    return model.predict_future(clips.pixels[:, :c], clips.actions[:, :c], future_actions, sample, seeds)


@torch.no_grad()
def evaluate_films(
    model: nn.Module,
    clips: Clips,
    mean_frame: Tensor,
    samples: int = 10,
    batch: int = 16,
    reader: PositionReader | None = None,
    lpips: Lpips | None = None,
    seed: int = 0,
) -> dict:
    """Everything that is measured step by step on predicted pictures. Only scores stay in memory from one batch to the next.

    Args:
        model: see the head of this file; in eval mode.
        mean_frame: [3, H, W] in [-1, 1], on the model's device, as `reader` and `lpips` are.
        samples: sampled predictions of each clip; with 0 there is no `sample_mean`, `sample_best`, `mean_picture` and
            `sampled_minus_deterministic`.
        batch: clips predicted at once.
        reader: reads positions; needs clips with positions.
        seed: of the samples. Each sample of each clip has a seed of its own, whatever `batch` and `samples`.

    Returns:
        clips, context, horizon, samples; `psnr`, `ssim` and, where measured, `lpips` per step under model, sample_mean, sample_best,
        mean_picture, repeat_last_frame, mean_frame; sampled_minus_deterministic: dB; positions: errors in pixels per step, and by_point
        over the first 16 steps and the horizon; explained_near: shares by film, steps and point, where there is a reader;
        psnr_gain_on_ each baseline and on the better one at each step, of the deterministic film; and of mean_picture,
        mean_picture_psnr_gain_on_better_baseline; action_shuffle_ratio, None where all clips are of one episode.
    """
    shuffled = clips.actions.roll(max(1, len(clips) // 2), 0)  # of another episode if there is one

    def measure(first: int) -> Iterator[tuple[str, Tensor]]:
        rows = slice(first, first + batch)
        part, others = clips[rows].to(mean_frame.device), shuffled[rows].to(mean_frame.device)
        seeds = [[sample_seed(seed, clip, sample) for clip in range(first, first + len(part))] for sample in range(samples)]
        return _measure(model, part, others, mean_frame, seeds, reader, lpips)

    joined = join(map(measure, range(0, len(clips), batch)))

    result = {"clips": len(clips), "context": clips.context, "horizon": clips.horizon, "samples": samples}
    result |= {name: curves(joined[f"{name}/scores"]) for name in FILMS}
    if samples:
        result |= _sample_curves(joined["samples/scores"]) | {"mean_picture": curves(joined["mean_picture/scores"])}
        gap = [ours - plain for ours, plain in zip(result["sample_mean"]["psnr"], result["model"]["psnr"])]
        at_step = gap[SAMPLE_STEP - 1] if len(gap) >= SAMPLE_STEP else None
        result["sampled_minus_deterministic"] = {f"at_step_{SAMPLE_STEP}": at_step, "decibels": gap}
    error, misled = (joined[f"{name}/scores"][..., 0].mean().item() for name in ("model", "misled"))
    result["action_shuffle_ratio"] = misled / error if len(clips.episodes.unique()) > 1 and error > 0 else None
    if reader is not None:
        errors = {name: joined[f"positions/{name}"] for name in ("model", "reader_on_truth", "repeat_last_frame")}  # [N, F, n]
        result["positions"] = _position_curves(errors, reader.names)
        near = {name.removeprefix("near/"): error for name, error in joined.items() if name.startswith("near/")}  # [N, F, m]
        result["explained_near"] = _explained(near, list(lines(reader.names)))
    baselines = {name: result[name]["psnr"] for name in ("repeat_last_frame", "mean_frame")}
    baselines["better_baseline"] = [max(pair) for pair in zip(*baselines.values())]
    for baseline, theirs in baselines.items():
        result[f"psnr_gain_on_{baseline}"] = _gain(result["model"]["psnr"], theirs)
    if samples:
        result["mean_picture_psnr_gain_on_better_baseline"] = _gain(result["mean_picture"]["psnr"], baselines["better_baseline"])
    return result


def _gain(ours: list[float], theirs: list[float]) -> dict[str, float | None]:
    """By how much the PSNR of one film is above that of another: mean over GAIN_STEPS, if there are so many, and least of all steps, dB."""
    gain = [a - b for a, b in zip(ours, theirs)]
    mean = sum(gain[step - 1] for step in GAIN_STEPS) / len(GAIN_STEPS) if len(gain) >= GAIN_STEPS[-1] else None
    return {"steps_5_to_16": mean, "smallest": min(gain)}


def join(batches: Iterable[Iterable[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    """Named values of batches of clips, measured one batch after the other -> those of all clips, [N, ...] each, on the host."""
    values: dict[str, list[Tensor]] = {}
    for measured in batches:
        for name, value in measured:
            values.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(parts) for name, parts in values.items()}


def _measure(
    model: nn.Module,
    clips: Clips,
    other_actions: Tensor,
    mean_frame: Tensor,
    seeds: list[list[int]],
    reader: PositionReader | None,
    lpips: Lpips | None,
) -> Iterator[tuple[str, Tensor]]:
    """Named measures of one batch of clips, [N, ...] each; `scores` end with axes [F, kind] (see `score`), `near/` and `positions/` with
    [F, line] and [F, point].

    `seeds` has a list for each sample, with a seed for each clip.
    """
    c = clips.context
    video = normalise(clips.pixels)
    truth, last = video[:, c:], video[:, c - 1 : c]
    predicted = predict(model, clips)["reconstructions"]
    films = {"model": predicted, "repeat_last_frame": last.expand_as(truth), "mean_frame": mean_frame.expand_as(truth)}
    masks = None
    if reader is not None:
        masks = masks_near(clips.positions[:, c:], list(lines(reader.names).values()), truth.shape[-1])
        for name, frames in (("model", predicted), ("reader_on_truth", truth), ("repeat_last_frame", last)):
            yield f"positions/{name}", position_errors(reader(frames), clips.positions[:, c:], truth.shape[-1])

    yield "misled/scores", score(predict(model, clips, other_actions[:, c:])["reconstructions"], truth, lpips)
    if seeds:
        total, scores, near = torch.zeros_like(truth), [], []
        for of_clips in seeds:
            film = predict(model, clips, sample=True, seeds=of_clips)["reconstructions"].float().clamp(-1, 1)
            total += film
            scores.append(score(film, truth, lpips))
            if masks is not None:
                near.append(error_near(film, truth, masks))
        yield "samples/scores", torch.stack(scores, 1)
        if near:
            yield "near/samples", torch.stack(near).mean(0)
        films["mean_picture"] = total / len(seeds)
    for name, film in films.items():
        yield f"{name}/scores", score(film, truth, lpips)
        if masks is not None:
            yield f"near/{name}", error_near(film, truth, masks)


def score(frames: Tensor, truth: Tensor, lpips: Lpips | None = None) -> Tensor:
    """Squared error, SSIM and, where measured, LPIPS of each frame: [N, F, 3, H, W] twice -> [N, F, kind]."""
    return torch.stack([squared_error(frames, truth), ssim(frames, truth)] + ([] if lpips is None else [lpips(frames, truth)]), -1)


def sample_seed(seed: int, clip: int, sample: int) -> int:
    """The seed of one sample of one clip, a function of these three numbers alone."""
    return int(np.random.SeedSequence((seed, clip, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def numbers(values: Tensor) -> list[float | None]:
    """A list with None for NaN, which JSON does not know."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def curves(scores: Tensor) -> dict[str, list[float]]:
    """Scores [N, F, kind] as lists over the steps, pooled over clips."""
    mean = scores.double().mean(0)
    found = {"psnr": [psnr(error) for error in mean[:, 0].tolist()], "ssim": mean[:, 1].tolist()}
    return found if scores.shape[-1] == 2 else found | {"lpips": mean[:, 2].tolist()}


def _sample_curves(scores: Tensor) -> dict[str, dict[str, list[float]]]:
    """Of scores [N, S, F, kind]: the mean over S of each sample's curves, and the curves of each clip's best sample.

    The best is that of the least squared error over the whole horizon: one film a clip, not the best frame of several.
    """
    each = [curves(sample) for sample in scores.unbind(1)]
    mean = {kind: torch.tensor([found[kind] for found in each], dtype=torch.float64).mean(0).tolist() for kind in each[0]}
    best = scores[..., 0].mean(-1).argmin(1)
    return {"sample_mean": mean, "sample_best": curves(scores[torch.arange(len(scores)), best])}


def _position_curves(errors: dict[str, Tensor], names: Sequence[str]) -> dict:
    """Errors [N, F, n] in pixels, NaN outside the picture: per step over all points, and by point over the first steps and all."""

    def by_point(steps: int | None) -> dict[str, dict[str, float | None]]:
        return {name: dict(zip(names, numbers(error[:, :steps].flatten(0, 1).nanmean(0)))) for name, error in errors.items()}

    result: dict = {name: numbers(error.transpose(1, 2).flatten(0, 1).nanmean(0)) for name, error in errors.items()}
    result |= {"inside": errors["model"].isfinite().float().mean().item(), "by_point": by_point(None)}
    if errors["model"].shape[1] >= NEAR_STEPS:
        result[f"by_point_steps_1_to_{NEAR_STEPS}"] = by_point(NEAR_STEPS)
    return result


def _explained(errors: dict[str, Tensor], names: list[str]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Shares by steps, film and line from errors [N, F, m] near the lines; that of the mean frame is what there is to explain."""
    mean_frame = errors.pop("mean_frame")
    spans = {f"steps_1_to_{NEAR_STEPS}": NEAR_STEPS} if mean_frame.shape[1] >= NEAR_STEPS else {}
    return {
        span: {film: explained_share(error[:, :steps], mean_frame[:, :steps], names) for film, error in errors.items()}
        for span, steps in (spans | {"whole_horizon": None}).items()
    }
