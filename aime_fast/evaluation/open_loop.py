"""Open-loop evaluation of a trained model on clips of held-out episodes. docs/evaluation.md says what each number means.

Convention: the model observes `context` frames and predicts `horizon` frames from actions alone. Scores are of the horizon only, step by
step, beside those of baselines without a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips
from aime_fast.evaluation.lpips import Lpips
from aime_fast.evaluation.measures import psnr, squared_error, ssim
from aime_fast.evaluation.positions import PositionReader, position_errors
from aime_fast.layers import starts
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

GAIN_STEPS = range(5, 17)  # steps over which the gain on a baseline is averaged
TOKEN_STEP = 10  # step at which token accuracies are compared
# Least values that a run is to reach: the named numbers of `targets`.
WANTED = {
    "psnr_gain_steps_5_to_16": 3.0,
    "smallest_psnr_gain": -0.5,
    "action_shuffle_ratio": 1.3,
    "rolled_out_token_accuracy_at_10": 0.6,
    "rolled_out_to_teacher_forced_at_10": 0.75,
}


def predict(
    model: DPGMMVariationalRecurrentAutoencoder,
    clips: Clips,
    future_actions: Tensor | None = None,
    sample: bool = False,
    seeds: Sequence[int] | None = None,
) -> TensorDict:
    """Open-loop prediction of the horizon of each clip, with its own actions or with `future_actions` [N, horizon, A].

    `sample` and `seeds` as in `predict_future`.
    """
    c = clips.context
    future_actions = clips.actions[:, c:] if future_actions is None else future_actions
    return model.predict_future(clips.pixels[:, :c], clips.actions[:, :c], future_actions, sample, seeds)


def predict_tokens(model: DPGMMVariationalRecurrentAutoencoder, tokens: Tensor, actions: Tensor, context: int) -> dict[str, Tensor]:
    """The most probable tokens of each frame after `context`, three ways.

    Args: tokens int64 [N, F, Ht, Wt, Q] of the true frames; actions [N, F, A].

    Returns:
        teacher_forced: from the true frame before; rolled_out: from its own tokens, after the last observed frame; repeat_last_frame: the
        tokens of that frame. All int64 [N, F - context, Ht, Wt, Q].
    """
    perceiver, future = model.perceiver_io, tokens[:, context:]
    before, start = slice(context - 1, -1), starts(None, *tokens.shape[:2], tokens.device)
    flat = (x[:, before].flatten(0, 1) for x in (tokens, perceiver.context(tokens, start), actions))
    return {
        "teacher_forced": perceiver.predictor.sample(*flat, temperature=0.0).view_as(future),
        "rolled_out": perceiver.generate_tokens(tokens[:, :context], actions[:, :-1], future.shape[1], temperature=0.0),
        "repeat_last_frame": tokens[:, context - 1 : context].expand_as(future),
    }


@torch.no_grad()
def evaluate_prediction(
    model: DPGMMVariationalRecurrentAutoencoder,
    clips: Clips,
    mean_frame: Tensor,
    samples: int = 10,
    batch: int = 16,
    reader: PositionReader | None = None,
    lpips: Lpips | None = None,
    seed: int = 0,
) -> dict:
    """Everything that is measured step by step on the horizon. Only scores stay in memory from one batch to the next.

    Args:
        mean_frame: [3, H, W] in [-1, 1], on the model's device, as `reader` and `lpips` are.
        samples: sampled predictions of each clip; with 0 there is no `sample_mean` and `sample_best`.
        batch: clips predicted at once.
        reader: reads positions; needs clips with positions.
        seed: of the samples. Each sample of each clip has a seed of its own, whatever `batch` and `samples`.

    Returns:
        clips, context, horizon, samples; `psnr`, `ssim` and, where measured, `lpips` per step under model, sample_mean, sample_best,
        token_model, repeat_last_frame, mean_frame, tokenizer; tokens: accuracies per step; positions: errors in
        pixels per step, and by_point over the horizon; psnr_gain_on_ each baseline and on the better one at each step;
        action_shuffle_ratio, None where all clips are of one episode; the numbers of `WANTED` as targets. See docs/evaluation.md.
    """
    shuffled = clips.actions.roll(max(1, len(clips) // 2), 0)  # of another episode if there is one
    scores: dict[str, list[Tensor]] = {}
    for first in range(0, len(clips), batch):
        rows = slice(first, first + batch)
        part, others = clips[rows].to(mean_frame.device), shuffled[rows].to(mean_frame.device)
        seeds = [[sample_seed(seed, clip, sample) for clip in range(first, first + len(part))] for sample in range(samples)]
        for name, values in _measure(model, part, others, mean_frame, seeds, reader, lpips):
            scores.setdefault(name, []).append(values.cpu())
    joined = {name: torch.cat(parts) for name, parts in scores.items()}  # [N, ...]

    result = {"clips": len(clips), "context": clips.context, "horizon": clips.horizon, "samples": samples}
    result |= {name: _curves(joined[f"{name}/scores"]) for name in ("model", "token_model", "repeat_last_frame", "mean_frame", "tokenizer")}
    if samples:
        result |= _sample_curves(joined["samples/scores"])
    tokens = {name.removeprefix("tokens/"): shares.mean(0) for name, shares in joined.items() if name.startswith("tokens/")}  # [F, 3]
    result["tokens"] = {name: shares[:, 0].tolist() for name, shares in tokens.items()}
    for name, shares in tokens.items():
        if name != "repeat_last_frame":  # it predicts no changed token
            result["tokens"][f"{name}_changed"] = _numbers(shares[:, 1] / shares[:, 2])
    error, misled = (joined[f"{name}/scores"][..., 0].mean().item() for name in ("model", "misled"))
    result["action_shuffle_ratio"] = misled / error if len(clips.episodes.unique()) > 1 and error > 0 else None
    if reader is not None:
        errors = {name: joined[f"positions/{name}"] for name in ("model", "reader_on_truth", "repeat_last_frame")}  # [N, F, n]
        by_point = {name: dict(zip(reader.names, _numbers(error.flatten(0, 1).nanmean(0)))) for name, error in errors.items()}
        result["positions"] = {name: _numbers(error.transpose(1, 2).flatten(0, 1).nanmean(0)) for name, error in errors.items()}
        result["positions"] |= {"inside": errors["model"].isfinite().float().mean().item(), "by_point": by_point}
    baselines = {name: result[name]["psnr"] for name in ("repeat_last_frame", "mean_frame")}
    baselines["better_baseline"] = [max(pair) for pair in zip(*baselines.values())]
    for baseline, theirs in baselines.items():
        gain = [ours - other for ours, other in zip(result["model"]["psnr"], theirs)]
        mean = sum(gain[step - 1] for step in GAIN_STEPS) / len(GAIN_STEPS) if len(gain) >= GAIN_STEPS[-1] else None
        result[f"psnr_gain_on_{baseline}"] = {"steps_5_to_16": mean, "smallest": min(gain)}
    result["targets"] = _targets(result)
    return result


def _measure(
    model: DPGMMVariationalRecurrentAutoencoder,
    clips: Clips,
    other_actions: Tensor,
    mean_frame: Tensor,
    seeds: list[list[int]],
    reader: PositionReader | None,
    lpips: Lpips | None,
) -> Iterator[tuple[str, Tensor]]:
    """Named scores of one batch of clips, [N, ...] each; `scores` end with axes [F, kind]: squared error, SSIM and LPIPS.

    `seeds` has a list for each sample, with a seed for each clip.
    """
    c = clips.context
    video = normalise(clips.pixels)
    truth, last = video[:, c:], video[:, c - 1 : c]

    def score(frames: Tensor) -> Tensor:
        kinds = [squared_error(frames, truth), ssim(frames, truth)] + ([] if lpips is None else [lpips(frames, truth)])
        return torch.stack(kinds, -1)

    predicted = predict(model, clips)["reconstructions"]
    yield "model/scores", score(predicted)
    yield "repeat_last_frame/scores", score(last.expand_as(truth))
    yield "mean_frame/scores", score(mean_frame.expand_as(truth))
    yield "misled/scores", score(predict(model, clips, other_actions[:, c:])["reconstructions"])
    if seeds:
        films = (predict(model, clips, sample=True, seeds=of_clips)["reconstructions"] for of_clips in seeds)
        yield "samples/scores", torch.stack([score(film) for film in films], 1)

    tokenizer = model.perceiver_io.tokenizer
    tokens, _, _ = tokenizer.encode(video.to(model.decoder.background.dtype))
    token_predictions = predict_tokens(model, tokens, clips.actions, c)
    imagined = torch.cat([video[:, :c], predicted.clamp(-1, 1)], 1).to(model.decoder.background.dtype)
    token_predictions["imagined"] = tokenizer.encode(imagined)[0][:, c:]
    changed = tokens[:, c:] != token_predictions["repeat_last_frame"]
    for name, guess in token_predictions.items():
        right = guess == tokens[:, c:]
        yield f"tokens/{name}", torch.stack([x.float().mean((-3, -2, -1)) for x in (right, right & changed, changed)], -1)
    yield "tokenizer/scores", score(tokenizer.decode(tokens)[:, c:])
    yield "token_model/scores", score(tokenizer.decode(torch.cat([tokens[:, :c], token_predictions["rolled_out"]], 1))[:, c:])

    if reader is not None:
        for name, frames in (("model", predicted), ("reader_on_truth", truth), ("repeat_last_frame", last)):
            yield f"positions/{name}", position_errors(reader(frames), clips.positions[:, c:], truth.shape[-1])


def sample_seed(seed: int, clip: int, sample: int) -> int:
    """The seed of one sample of one clip, a function of these three numbers alone."""
    return int(np.random.SeedSequence((seed, clip, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _numbers(values: Tensor) -> list[float | None]:
    """A list with None for NaN, which JSON does not know."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _curves(scores: Tensor) -> dict[str, list[float]]:
    """Scores [N, F, kind] as lists over the steps, pooled over clips."""
    mean = scores.double().mean(0)
    curves = {"psnr": [psnr(error) for error in mean[:, 0].tolist()], "ssim": mean[:, 1].tolist()}
    return curves if scores.shape[-1] == 2 else curves | {"lpips": mean[:, 2].tolist()}


def _sample_curves(scores: Tensor) -> dict[str, dict[str, list[float]]]:
    """Of scores [N, S, F, kind]: the mean over S of each sample's curves, and the curves of each clip's best sample.

    The best is that of the least squared error over the whole horizon: one film a clip, not the best frame of several.
    """
    each = [_curves(sample) for sample in scores.unbind(1)]
    mean = {kind: torch.tensor([curves[kind] for curves in each], dtype=torch.float64).mean(0).tolist() for kind in each[0]}
    best = scores[..., 0].mean(-1).argmin(1)
    return {"sample_mean": mean, "sample_best": _curves(scores[torch.arange(len(scores)), best])}


def _targets(result: dict) -> dict[str, dict]:
    """The numbers of `WANTED` with the wanted value and whether it is met; value and met are None where the horizon is too short."""
    gain = result["psnr_gain_on_repeat_last_frame"]
    smallest = result["psnr_gain_on_better_baseline"]["smallest"]
    values: dict[str, float | None] = dict.fromkeys(WANTED)
    values |= {"psnr_gain_steps_5_to_16": gain["steps_5_to_16"], "smallest_psnr_gain": smallest}
    values["action_shuffle_ratio"] = result["action_shuffle_ratio"]
    if result["horizon"] >= TOKEN_STEP:
        rolled, forced = (result["tokens"][name][TOKEN_STEP - 1] for name in ("rolled_out", "teacher_forced"))
        values["rolled_out_token_accuracy_at_10"] = rolled
        values["rolled_out_to_teacher_forced_at_10"] = rolled / forced if forced > 0 else None
    return {
        name: {"value": value, "wanted": WANTED[name], "met": None if value is None else value >= WANTED[name]}
        for name, value in values.items()
    }
