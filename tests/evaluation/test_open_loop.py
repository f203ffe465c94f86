"""The open-loop evaluation of predictors that are known to be right or wrong in a known way."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from aime_fast.config import preset
from aime_fast.data import make_batches, normalise
from aime_fast.evaluation import films
from aime_fast.evaluation import open_loop as evaluation
from aime_fast.evaluation.clips import Clips, cut_clips
from aime_fast.evaluation.measures import MAX_PSNR
from aime_fast.evaluation.open_loop import evaluate_prediction, predict_tokens
from aime_fast.evaluation.positions import PositionReader
from aime_fast.evaluation.validation import evaluate_sequences, validate
from aime_fast.multi_task_learning import LossAggregator

CONTEXT, HORIZON = 2, 16


def make_clips(model, count: int = 3) -> Clips:
    generator = torch.Generator().manual_seed(0)
    frames, size = CONTEXT + HORIZON, model.image_size
    pixels = torch.randint(0, 256, (count, frames, 3, size, size), generator=generator, dtype=torch.uint8)
    actions = torch.rand(count, frames, model.action_dim, generator=generator) * 2 - 1
    positions = torch.rand(count, frames, 2, 2, generator=generator) * (size - 1)
    return Clips(pixels, actions, CONTEXT, torch.arange(count), positions)


def evaluate(model, clips: Clips, **options) -> dict:
    mean_frame = normalise(clips.pixels).mean((0, 1))
    result = evaluate_prediction(model, clips, mean_frame, **{"samples": 2, "batch": 2} | options)
    json.dumps(result, allow_nan=False)
    return result


def test_a_model_that_copies_the_last_frame_scores_as_repeat_last_frame(model, monkeypatch):
    def copy(observations, actions, future_actions, sample=False, seeds=None):
        last = normalise(observations[:, -1:]).expand(-1, future_actions.shape[1], -1, -1, -1)
        return TensorDict({"reconstructions": last}, batch_size=future_actions.shape[:2])

    monkeypatch.setattr(model, "predict_future", copy)
    clips = make_clips(model)
    reader = PositionReader(clips.pixels.flatten(0, 1), clips.positions.flatten(0, 1), ["a", "b"], neighbours=1)
    result = evaluate(model, clips, reader=reader)
    for name in ("model", "sample_mean", "sample_best"):
        assert result[name] == result["repeat_last_frame"], name
    assert len(result["model"]["psnr"]) == len(result["tokens"]["rolled_out"]) == HORIZON
    assert result["model"] != result["mean_frame"]
    tokens = model.perceiver_io.tokenizer.encode(normalise(clips.pixels).double())[0]
    still = (tokens[:, CONTEXT:] == tokens[:, CONTEXT - 1 : CONTEXT]).float().mean((0, 2, 3, 4))
    assert result["tokens"]["repeat_last_frame"] == pytest.approx(still.tolist())
    assert result["psnr_gain_on_repeat_last_frame"] == {"steps_5_to_16": 0, "smallest": 0}
    assert result["action_shuffle_ratio"] == 1
    assert {name: target["met"] for name, target in result["targets"].items() if "psnr" in name or "shuffle" in name} == {
        "psnr_gain_steps_5_to_16": False,
        "smallest_psnr_gain": False,  # of random pixels the mean frame is the better picture
        "action_shuffle_ratio": False,
    }
    # The reader knows these very frames: it errs nowhere on the truth, and the copies are read as where things were.
    positions = result["positions"]
    assert positions["reader_on_truth"] == [0] * HORIZON
    assert positions["model"] == positions["repeat_last_frame"]
    moved = (clips.positions[:, CONTEXT - 1 : CONTEXT] - clips.positions[:, CONTEXT:]).norm(dim=-1)
    assert positions["model"] == pytest.approx(moved.mean((0, 2)).tolist(), rel=1e-5)
    assert positions["by_point"]["model"]["b"] == pytest.approx(moved[..., 1].mean().item(), rel=1e-5)


def test_a_perfect_predictor_reaches_the_cap_and_one_that_uses_actions_a_high_ratio(model, monkeypatch):
    clips = make_clips(model)

    def know(observations, actions, future_actions, sample=False, seeds=None, error=0.0):
        row = (clips.pixels[None, :, 0] == observations[:, None, 0]).flatten(2).all(-1).long().argmax(1)
        wrong = (future_actions - clips.actions[row, CONTEXT:]).abs().mean((1, 2))
        predicted = normalise(clips.pixels[row, CONTEXT:]) * (1 - error - wrong)[:, None, None, None, None]
        return TensorDict({"reconstructions": predicted}, batch_size=future_actions.shape[:2])

    def know_tokens(model, tokens, actions, context, imagined):
        last = tokens[:, context - 1 : context].expand_as(tokens[:, context:])
        return {"teacher_forced": last, "rolled_out": tokens[:, context:], "imagined": imagined, "repeat_last_frame": last}

    monkeypatch.setattr(model, "predict_future", know)
    monkeypatch.setattr(evaluation, "predict_tokens", know_tokens)
    perfect = evaluate(model, clips)
    assert perfect["tokens"]["rolled_out"] == perfect["tokens"]["rolled_out_changed"] == [1] * HORIZON
    assert perfect["tokens"]["teacher_forced_changed"] == [0] * HORIZON
    assert perfect["model"]["psnr"] == [MAX_PSNR] * HORIZON
    assert perfect["model"]["ssim"] == pytest.approx([1.0] * HORIZON)
    assert perfect["action_shuffle_ratio"] is None
    assert perfect["targets"]["psnr_gain_steps_5_to_16"]["met"]

    monkeypatch.setattr(model, "predict_future", lambda *given: know(*given, error=0.1))
    assert evaluate(model, clips)["action_shuffle_ratio"] > 10


def test_the_best_sample_is_one_film_and_scores_do_not_depend_on_the_batch(model, monkeypatch):
    clips = make_clips(model)
    calls = iter(range(100))

    def noisy(observations, actions, future_actions, sample=False, seeds=None):
        spread = 0.1 + 0.1 * (next(calls) % 3) if sample else 0.5
        predicted = normalise(clips.pixels[:, CONTEXT:]) * (1 - spread)
        return TensorDict({"reconstructions": predicted}, batch_size=future_actions.shape[:2])

    monkeypatch.setattr(model, "predict_future", noisy)
    result = evaluate(model, clips, samples=3, batch=8)
    power = normalise(clips.pixels[:, CONTEXT:]).square().mean((0, 2, 3, 4))
    expected = (10 * torch.log10(4 / (0.01 * power))).tolist()
    assert result["sample_best"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert all(result["sample_best"]["psnr"][i] > result["sample_mean"]["psnr"][i] > result["model"]["psnr"][i] for i in range(HORIZON))

    monkeypatch.undo()
    without, small = (evaluate(model, clips, samples=0, batch=batch) for batch in (8, 1))
    assert "sample_best" not in without
    for name in ("model", "token_model", "tokenizer"):
        assert without[name]["psnr"] == pytest.approx(small[name]["psnr"], rel=1e-5), name


def test_samples_depend_on_neither_batch_nor_number_of_samples(model):
    clips = make_clips(model)
    several, single, fewer = (evaluate(model, clips, samples=s, batch=b, seed=3) for s, b in ((2, 8), (2, 1), (1, 2)))
    assert several["sample_mean"]["psnr"] == pytest.approx(single["sample_mean"]["psnr"], rel=1e-5)
    assert several["sample_mean"]["psnr"] != pytest.approx(
        evaluate(model, clips, samples=2, batch=8, seed=4)["sample_mean"]["psnr"], rel=1e-8
    )
    seeds = [films.sample_seed(3, clip, 0) for clip in range(len(clips))]
    first = films.predict(model, clips, sample=True, seeds=seeds)["latents"]
    for row in range(len(clips)):
        alone = films.predict(model, clips[row : row + 1], sample=True, seeds=seeds[row : row + 1])["latents"]
        torch.testing.assert_close(alone[0], first[row])
    assert fewer["samples"] == 1


def test_sequences_measure_the_same_whatever_was_drawn_before(model):
    config = preset("debug")
    training, held_out = make_batches(replace(config.data, data="synthetic"), 0)
    mean_frame, size, plain = training.mean_frame(), config.model.codebook_size, model.float()
    first = evaluate_sequences(plain, held_out.one_pass(), mean_frame, size, seed=1)
    torch.rand(7)
    assert evaluate_sequences(plain, held_out.one_pass(), mean_frame, size, seed=1) == first
    assert evaluate_sequences(plain, held_out.one_pass(), mean_frame, size, seed=2)["calibration"] != first["calibration"]
    model.double()
    training.close()
    held_out.close()


def test_actions_of_a_single_episode_are_no_other_actions(model):
    clips = replace(make_clips(model), episodes=torch.zeros(3, dtype=torch.int64))
    assert evaluate(model, clips)["action_shuffle_ratio"] is None


def test_the_smallest_gain_is_on_the_better_baseline(model):
    result = evaluate(model, make_clips(model))
    better = [max(pair) for pair in zip(result["repeat_last_frame"]["psnr"], result["mean_frame"]["psnr"])]
    expected = min(ours - theirs for ours, theirs in zip(result["model"]["psnr"], better))
    assert result["psnr_gain_on_better_baseline"]["smallest"] == pytest.approx(expected)
    assert result["targets"]["smallest_psnr_gain"]["value"] == pytest.approx(expected)


def test_rolled_out_tokens_depend_on_observed_frames_alone(model):
    shape = (2, 6, model.perceiver_io.tokenizer.grid, model.perceiver_io.tokenizer.grid, 2)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, shape, generator=generator)
    actions = torch.rand(2, 6, model.action_dim, generator=generator, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 32
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.perceiver_io.predictor.stay.bias.zero_()  # untrained, it would repeat every token
        model.perceiver_io.predictor.follow.bias.zero_()
        imagined = torch.randint(0, 32, (2, 4, *shape[2:]), generator=generator)
        before, after = (predict_tokens(model, x, actions, 2, imagined) for x in (tokens, changed))
        other_film = predict_tokens(model, tokens, actions, 2, torch.cat([imagined[:, :2], (imagined[:, 2:] + 1) % 32], 1))
    assert torch.equal(before["rolled_out"], after["rolled_out"])
    assert torch.equal(before["rolled_out"][:, :2], other_film["rolled_out"][:, :2])
    assert not torch.equal(before["rolled_out"][:, 2:], other_film["rolled_out"][:, 2:])
    assert torch.equal(before["teacher_forced"], other_film["teacher_forced"])
    differs = (before["teacher_forced"] != after["teacher_forced"]).flatten(2).any(-1)  # [B, frames 2..5]
    assert not differs[:, :3].any(), "a frame is predicted from itself or from later ones"
    assert differs[:, 3].all(), "frame 5 is not predicted from the true frame 4"
    with torch.no_grad():
        alone = model.perceiver_io.generate_tokens(tokens[:, :2], actions, 1, temperature=0.0)
    assert torch.equal(alone[:, 0], before["teacher_forced"][:, 0])
    assert torch.equal(before["repeat_last_frame"][:, 3], tokens[:, 1])


def test_clips_are_spread_evenly_from_the_first_frame_to_the_last():
    def episode(length: int) -> TensorDict:
        pixels = torch.arange(length, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        return TensorDict({"pixels": pixels, "action": torch.zeros(length, 1)}, batch_size=[length])

    clips = cut_clips([episode(40), episode(11), episode(9)], 4, 6, 4)
    assert clips.pixels[:, 0, 0, 0, 0].tolist() == [0, 10, 20, 30, 0, 1]
    assert clips.horizon == 6
    assert clips.positions is None
    with pytest.raises(ValueError, match="--horizon 37: the longest held-out episode has 40 frames"):
        cut_clips([episode(40)], 4, 37, 4)


def test_validation_and_evaluation_measure_alike(model):
    config = preset("debug")
    training, held_out = make_batches(replace(config.data, data="synthetic"), 0)
    try:
        mean_frame = training.mean_frame()
        losses = LossAggregator()
        with torch.no_grad():
            during = validate(model, held_out.one_pass(), losses, mean_frame, config.model.codebook_size, 1000)
        after = evaluate_sequences(model, held_out.one_pass(), mean_frame, config.model.codebook_size)
    finally:
        training.close()
        held_out.close()
    reconstruction = dict(after["reconstruction"])
    assert 0 <= reconstruction.pop("token_accuracy") <= 1
    assert {name: during[name] for name in reconstruction} == reconstruction
    assert any(name.startswith("loss/") for name in during)
    assert {"probe_attention_db", "probe_context_nats", "probe_action_shuffle_ratio"} <= set(during)
    assert sum(after["calibration"]["rank_histogram"]) == pytest.approx(1)
