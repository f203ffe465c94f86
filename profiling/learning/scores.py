"""What both models are measured by: the same clips of held-out episodes, the same code."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aime_fast.config import Config
from aime_fast.data import make_batches, normalise
from aime_fast.evaluation.clips import Clips, cut_clips
from aime_fast.evaluation.explained import explain_reconstruction
from aime_fast.evaluation.films import GAIN_STEPS, NEAR_STEPS, evaluate_films, predict
from aime_fast.evaluation.lpips import Lpips, find_lpips
from aime_fast.evaluation.measures import psnr, squared_error
from aime_fast.evaluation.positions import PositionReader

POINT_CLIPS = 4  # clips of each validation episode by which a point of the curves is measured


def add_clip_options(parser: argparse.ArgumentParser) -> None:
    """What `hold_out` and `measure` are given, as options of a command."""
    parser.add_argument("--context", type=int, default=8, metavar="N", help="observed frames of a clip; default 8")
    parser.add_argument("--horizon", type=int, default=50, metavar="N", help="predicted frames of a clip; default 50")
    parser.add_argument("--clips", type=int, default=8, metavar="N", help="clips of each test episode; default 8")
    parser.add_argument("--samples", type=int, default=10, metavar="N", help="sampled films of each clip; default 10")


@dataclass(frozen=True)
class HeldOutClips:
    """Clips of test and of validation episodes, and what the measures need beside them."""

    scored: Clips  # of the episodes of `part`
    validation: Clips
    mean_frame: Tensor  # [3, H, W] in [-1, 1], of the training episodes
    reader: PositionReader | str  # or why there is none
    lpips: Lpips | str


def hold_out(config: Config, context: int, horizon: int, clips: int, part: str = "test") -> HeldOutClips:
    """The clips of a run's data; `part`, test or validation: of those that are scored. Raises ValueError where no episode is as long as a
    clip."""
    from aime_fast.evaluate import held_out  # a command: it needs tyro

    parts = make_batches(config.data, config.run.seed, "cpu", parts=("training", "validation", "test"))
    try:
        training, validation, test = parts
        held = held_out(config.data, training, validation if part == "validation" else test, None)
        valid = [validation.episode(i) for i in range(len(validation.episodes))]
        return HeldOutClips(
            cut_clips(held.episodes, context, horizon, clips), cut_clips(valid, context, horizon, POINT_CLIPS), training.mean_frame(),
            held.reader, find_lpips(torch.device("cpu")),
        )  # fmt: skip
    finally:
        for part in parts:
            part.close()


def measure(model: nn.Module, held: HeldOutClips, samples: int, batch: int = 16) -> dict[str, Any]:
    """The measures of scored clips: `films`, see `evaluate_films`, and of the whole clips `reconstruction_psnr` and, where positions are
    known, `reconstruction_explained`, see `explain_reconstruction`."""
    reader, lpips = (None if isinstance(found, str) else found for found in (held.reader, held.lpips))
    films = evaluate_films(model, held.scored, held.mean_frame, samples, batch, reader, lpips)
    found = {"reconstruction_psnr": reconstruction_psnr(model, held.scored, batch), "films": films}
    if reader is not None:
        found["reconstruction_explained"] = explain_reconstruction(model, held.scored, held.mean_frame, reader.names, batch)
    return found


def measure_point(model: nn.Module, held: HeldOutClips, batch: int = 16) -> dict[str, float | None]:
    """A point of the curves, of validation clips: `reconstruction_psnr`, and `gain`, that of the predicted film on the better of
    repeat-last-frame and the mean frame in dB, mean over steps 5 to 16 (None: the horizon is shorter)."""
    clips = held.validation
    errors = []
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch]
        video = normalise(part.pixels)
        truth, last = video[:, clips.context :], video[:, clips.context - 1 : clips.context]
        frames = (predict(model, part)["reconstructions"], last.expand_as(truth), held.mean_frame.expand_as(truth))
        errors.append(torch.stack([squared_error(each, truth) for each in frames]))
    film, *baselines = torch.cat(errors, 1).double().mean(1).tolist()  # [F] each
    gains = [psnr(error) - max(map(psnr, others)) for error, *others in zip(film, *baselines)]
    gain = sum(gains[step - 1] for step in GAIN_STEPS) / len(GAIN_STEPS) if len(gains) >= GAIN_STEPS[-1] else None
    return {"reconstruction_psnr": reconstruction_psnr(model, clips, batch), "gain": gain}


@torch.no_grad()
def reconstruction_psnr(model: nn.Module, clips: Clips, batch: int) -> float:
    """PSNR in dB, pooled over all frames of the clips, each of which is observed."""
    errors = []
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch]
        video = normalise(part.pixels)
        errors.append(squared_error(model.reconstruct(video, part.actions), video))
    return psnr(torch.cat(errors).double().mean().item())


def rows(measured: dict[str, Any]) -> dict[str, float | None]:
    """What `measure` returned as the rows of the table: values by label."""
    films, horizon = measured["films"], measured["films"]["horizon"]
    repeat, better = films["psnr_gain_on_repeat_last_frame"], films["psnr_gain_on_better_baseline"]
    steps = f"steps {GAIN_STEPS[0]} to {GAIN_STEPS[-1]}"
    found = {
        "reconstruction, PSNR dB": measured["reconstruction_psnr"],
        f"gain on repeat-last-frame, {steps}, dB": repeat["steps_5_to_16"],
        f"gain on the better baseline, {steps}, dB": better["steps_5_to_16"],
        f"smallest gain on the better baseline to step {horizon}, dB": better["smallest"],
        "action-shuffle ratio": films["action_shuffle_ratio"],
    }
    if gain := films.get("mean_picture_psnr_gain_on_better_baseline"):
        label = "gain of the mean picture of samples on the better baseline"
        found |= {f"{label}, {steps}, dB": gain["steps_5_to_16"], f"smallest {label} to step {horizon}, dB": gain["smallest"]}
    for line, share in measured.get("reconstruction_explained", {}).items():
        found[f"explained within 2 pixels of {line}, reconstruction"] = share
    films_of = {"model": "deterministic film", "sample_mean": "sampled film", "mean_picture": "mean picture of samples"}
    for name, label in films_of.items():
        if name in films:
            found[f"PSNR of the {label}, mean of steps 1 to {horizon}, dB"] = sum(films[name]["psnr"]) / horizon
    if "sampled_minus_deterministic" in films:
        found["sampled minus deterministic at step 5, dB"] = films["sampled_minus_deterministic"]["at_step_5"]
    if "lpips" in films["model"]:
        found[f"LPIPS of the deterministic film, mean of steps 1 to {horizon}"] = sum(films["model"]["lpips"]) / horizon
    spans = {f"by_point_steps_1_to_{NEAR_STEPS}": NEAR_STEPS, "by_point": horizon}
    for key, last in spans.items():
        for point, error in films.get("positions", {}).get(key, {}).get("model", {}).items():
            found[f"position error of {point}, steps 1 to {last}, pixels"] = error
    spans = {f"steps_1_to_{NEAR_STEPS}": NEAR_STEPS, "whole_horizon": horizon}
    for key, last in spans.items():
        for line, share in films.get("explained_near", {}).get(key, {}).get("model", {}).items():
            found[f"explained within 2 pixels of {line}, steps 1 to {last}"] = share
    return found
