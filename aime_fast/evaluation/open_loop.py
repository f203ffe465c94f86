"""Open-loop evaluation of a trained model on clips of held-out episodes: its films, its tokens, its targets. docs/evaluation.md says what
each number means.

Convention: the model observes `context` frames and predicts `horizon` frames from actions alone. Scores are of the horizon only, step by
step, beside those of baselines without a model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips
from aime_fast.evaluation.films import curves, evaluate_films, join, numbers, predict, score
from aime_fast.evaluation.lpips import Lpips
from aime_fast.evaluation.positions import PositionReader
from aime_fast.layers import starts
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

TOKEN_STEP = 10  # step at which the token model is judged
# Least values that a run is to reach: the named numbers of `targets`.
WANTED = {"psnr_gain_steps_5_to_16": 3.0, "smallest_psnr_gain": 0.0, "action_shuffle_ratio": 2.0, "rolled_out_changed_tokens_at_10": 0.4}


def predict_tokens(
    model: DPGMMVariationalRecurrentAutoencoder, tokens: Tensor, actions: Tensor, context: int, imagined: Tensor
) -> dict[str, Tensor]:
    """The most probable tokens of each frame after `context`, four ways.

    Args: tokens int64 [N, F, Ht, Wt, Q] of the true frames; actions [N, F, A]; imagined [N, F - context, Ht, Wt, Q], of a predicted film.

    Returns:
        teacher_forced: from the true frame before; rolled_out: from its own tokens and the imagined ones, after the last observed frame;
        imagined; repeat_last_frame: the tokens of that frame. All int64 [N, F - context, Ht, Wt, Q].
    """
    perceiver, future = model.perceiver_io, tokens[:, context:]
    before, start = slice(context - 1, -1), starts(None, *tokens.shape[:2], tokens.device)
    flat = (x[:, before].flatten(0, 1) for x in (tokens, perceiver.context(tokens, start), actions))
    return {
        "teacher_forced": perceiver.predictor.sample(*flat, temperature=0.0).view_as(future),
        "rolled_out": perceiver.generate_tokens(tokens[:, :context], actions[:, :-1], future.shape[1], temperature=0.0, drawn=imagined),
        "imagined": imagined,
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
    """Everything that is measured step by step on the horizon; arguments as in `evaluate_films`.

    Returns:
        what `evaluate_films` and `evaluate_tokens` return, and the numbers of `WANTED` as targets.
    """
    result = evaluate_films(model, clips, mean_frame, samples, batch, reader, lpips, seed)
    result |= evaluate_tokens(model, clips, mean_frame.device, batch, lpips)
    return result | {"targets": _targets(result)}


@torch.no_grad()
def evaluate_tokens(
    model: DPGMMVariationalRecurrentAutoencoder, clips: Clips, device: torch.device, batch: int = 16, lpips: Lpips | None = None
) -> dict:
    """What concerns tokens, step by step: pictures of token_model and tokenizer as `curves`; tokens: accuracies of several predictions.

    The model's own film is predicted once more: films of all clips would not fit in memory.
    """
    parts = (clips[first : first + batch].to(device) for first in range(0, len(clips), batch))
    joined = join(_measure_tokens(model, part, lpips) for part in parts)
    result: dict = {name: curves(joined.pop(name)) for name in ("token_model", "tokenizer")}
    tokens = {name: shares.mean(0) for name, shares in joined.items()}  # [F, 3]
    result["tokens"] = {name: shares[:, 0].tolist() for name, shares in tokens.items()}
    for name, shares in tokens.items():
        if name != "repeat_last_frame":  # it predicts no changed token
            result["tokens"][f"{name}_changed"] = numbers(shares[:, 1] / shares[:, 2])
    return result


def _measure_tokens(model: DPGMMVariationalRecurrentAutoencoder, clips: Clips, lpips: Lpips | None) -> Iterator[tuple[str, Tensor]]:
    """Scores [N, F, kind] of the pictures of token_model and tokenizer, and of each prediction of tokens [N, F, 3]: shares of tokens that
    are right, right and changed, changed."""
    c, tokenizer, dtype = clips.context, model.perceiver_io.tokenizer, model.decoder.background.dtype
    video = normalise(clips.pixels)
    tokens, _, _ = tokenizer.encode(video.to(dtype))
    film = predict(model, clips)["reconstructions"].clamp(-1, 1).to(dtype)
    imagined = tokenizer.encode(torch.cat([video[:, :c].to(dtype), film], 1))[0][:, c:]
    token_predictions = predict_tokens(model, tokens, clips.actions, c, imagined)
    changed = tokens[:, c:] != token_predictions["repeat_last_frame"]
    for name, guess in token_predictions.items():
        right = guess == tokens[:, c:]
        yield name, torch.stack([x.float().mean((-3, -2, -1)) for x in (right, right & changed, changed)], -1)
    rolled_out = torch.cat([tokens[:, :c], token_predictions["rolled_out"]], 1)
    for name, codes in (("tokenizer", tokens), ("token_model", rolled_out)):
        yield name, score(tokenizer.decode(codes)[:, c:], video[:, c:], lpips)


def _targets(result: dict) -> dict[str, dict]:
    """The numbers of `WANTED` with the wanted value and whether it is met; value and met are None where the horizon is too short."""
    gain = result["psnr_gain_on_better_baseline"]
    values: dict[str, float | None] = dict.fromkeys(WANTED)
    values |= {"psnr_gain_steps_5_to_16": gain["steps_5_to_16"], "smallest_psnr_gain": gain["smallest"]}
    values["action_shuffle_ratio"] = result["action_shuffle_ratio"]
    if result["horizon"] >= TOKEN_STEP:
        values["rolled_out_changed_tokens_at_10"] = result["tokens"]["rolled_out_changed"][TOKEN_STEP - 1]
    return {
        name: {"value": value, "wanted": WANTED[name], "met": None if value is None else value >= WANTED[name]}
        for name, value in values.items()
    }
