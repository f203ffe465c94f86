"""Probes of models that are known to read, or not to read, what a probe replaces."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips
from aime_fast.evaluation.films import GAIN_STEPS, predict
from aime_fast.evaluation.measures import psnr, squared_error
from aime_fast.evaluation.probes import LOGGED, ValidationProbes, interleave, probe_films, probe_sequences
from aime_fast.evaluation.readout import probe_latents, quantities, r_squared, read_linearly, read_neighbours

CPU = torch.device("cpu")
FRAMES = 5


def make_episodes(model, count: int = 3, length: int = 11) -> list[TensorDict]:
    generator = torch.Generator().manual_seed(0)
    size = model.image_size

    def one() -> TensorDict:
        values = {
            "pixels": torch.randint(0, 256, (length, 3, size, size), generator=generator, dtype=torch.uint8),
            "action": torch.rand(length, model.action_dim, generator=generator) * 2 - 1,
            "is_init": torch.arange(length)[:, None] == 0,
            "positions": torch.rand(length, 3, 2, generator=generator) * (size - 1),
        }
        return TensorDict(values, batch_size=[length])

    return [one() for _ in range(count)]


def make_clips(model) -> Clips:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (3, 18, 3, model.image_size, model.image_size), generator=generator, dtype=torch.uint8)
    return Clips(pixels, torch.rand(3, 18, model.action_dim, generator=generator).double() * 2 - 1, 2, torch.arange(3))


def probe(model, episodes=None) -> dict:
    rows = probe_sequences(model, episodes or make_episodes(model), FRAMES, CPU, batch=4)
    rows |= probe_films(model, make_clips(model), CPU, batch=3)
    return json.loads(json.dumps(rows, allow_nan=False))


@contextmanager
def weights(*parameters: torch.Tensor, factor: float):
    """Parameters multiplied by `factor`; restored afterwards."""
    saved = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter *= factor
    yield
    with torch.no_grad():
        for parameter, old in zip(parameters, saved):
            parameter.copy_(old)


def modulations(model) -> list[torch.Tensor]:
    return [p for modulation in model.decoder.modulations for p in modulation.parameters()]


def test_a_decoder_that_ignores_attention_loses_nothing_with_a_uniform_map(model):
    reads = probe(model)
    assert reads["attention_in_reconstruction"]["cost"] != 0 != reads["attention_in_films"]["cost"]
    with weights(*modulations(model), factor=0.0):
        ignores = probe(model)
    for name in ("attention_in_reconstruction", "attention_in_films"):
        assert ignores[name]["cost"] == pytest.approx(0, abs=1e-5), name


def test_a_decoder_that_draws_by_attention_loses_decibels_with_a_uniform_map(model, monkeypatch):
    """Frames are squares in one quarter; the map lies on it, and the decoder draws where the map lies."""
    episodes, size = make_episodes(model), model.image_size
    for i, episode in enumerate(episodes):
        episode["pixels"].zero_()
        episode["pixels"][:, :, : size // 2, : size // 2] = 255 if i % 2 else 200
        episode["positions"][:] = torch.tensor([[size // 4 - 0.5] * 2, [-5.0, 3.0], [3.0, -5.0]])
    corner = torch.zeros(model.attention.grid, model.attention.grid, dtype=torch.float64)
    half = model.attention.grid // 2
    corner[:half, :half] = 1 / half**2

    def looks(frames, hidden, context, inferred=model.attention.posterior.forward):
        maps = inferred(frames, hidden, context)
        return maps._replace(attention=corner.expand_as(maps.attention))

    def draws(latents, attention):
        share = torch.nn.functional.interpolate((attention * half**2)[:, None], (size, size)).expand(-1, 3, -1, -1)
        return model.decoder.likelihood.around((2 * share - 1).contiguous(), torch.zeros(3, size, size).double())

    monkeypatch.setattr(model.attention.posterior, "forward", looks)
    monkeypatch.setattr(model.decoder, "forward", draws)
    rows = probe(model, episodes)
    assert rows["attention_in_reconstruction"]["cost"] > 3
    assert rows["attention_from_uniform"]["intact"] == pytest.approx(math.log(4))
    assert rows["attention_near_points"]["intact"] == 1  # within an eighth of the side of the one point in the picture
    assert rows["attention_near_points"]["replaced"] == 0  # the middle of the picture is not


def test_a_model_that_ignores_context_loses_nothing_with_that_of_another_sequence(model):
    with weights(model.perceiver_io.out[-1].weight, factor=30.0):  # the debug model's contexts are much alike
        reads = probe(model)
    for name in ("context_in_reconstruction", "context_in_tokens", "context_in_films"):
        assert abs(reads[name]["cost"]) > 1e-6, name
    with weights(model.perceiver_io.out[-1].weight, factor=0.0):  # every frame has the same context
        ignores = probe(model)
    for name in ("context_in_reconstruction", "context_in_tokens", "context_in_films"):
        assert ignores[name]["cost"] == pytest.approx(0, abs=1e-9), name
    assert ignores["context_spread"]["intact"] < 1e-9 < reads["context_spread"]["intact"]
    assert ignores["actions_in_tokens"]["cost"] != 0


def test_a_predictor_that_knows_the_next_tokens_from_the_context_loses_nats(model, monkeypatch):
    """Sequence b shows code b throughout; the predictor gives all its weight to the code nearest to the first number of its context."""
    episodes = make_episodes(model)
    outputs = model.encode(normalise(torch.stack([e["pixels"][:FRAMES] for e in episodes])).double())
    code = torch.arange(3)[:, None, None, None, None].expand_as(outputs["tokens"])
    context = torch.zeros_like(outputs["context"])
    context[..., 0] = torch.arange(3)[:, None]
    actions = torch.stack([e["action"][:FRAMES] for e in episodes]).double()
    predictor = model.perceiver_io.predictor

    def knows(tokens, context, actions, *hidden):
        wanted = context[..., 0].round().long()[..., None, None, None].expand_as(tokens)
        return torch.nn.functional.one_hot(wanted, predictor.codes).double() * 20

    monkeypatch.setattr(predictor, "forward", knows)
    start = torch.arange(FRAMES)[None].expand(3, -1) == 0
    true = predictor.loss(code, context, actions, start)
    other = predictor.loss(code, context.roll(1, 0), actions, start)
    assert true[0] < 1e-3
    assert true[1] == 1
    assert other[0] > 10
    monkeypatch.setattr(model.perceiver_io, "context", lambda tokens, start: context[: len(tokens)])
    monkeypatch.setattr(model.perceiver_io.tokenizer, "tokenize", _constant(model.perceiver_io.tokenizer.tokenize, code))
    rows = probe_sequences(model, [e[:FRAMES] for e in episodes], FRAMES, CPU, batch=4)
    assert rows["context_in_tokens"]["cost"] > 10
    assert rows["context_in_token_accuracy"] == {"intact": 1, "replaced": 0, "cost": 1, "unit": "share"}
    assert rows["actions_in_tokens"]["cost"] == 0


def _constant(tokenize, code):
    return lambda *given, **options: tokenize(*given, **options)._replace(codes=code)


def test_actions_of_a_model_that_ignores_them_cost_nothing(model):
    reads = probe(model)
    for name in ("actions_in_tokens", "actions_in_prior", "actions_in_films"):
        assert reads[name]["cost"] != 0, name
    inputs = model.recurrence.input_gates[0].weight, model.perceiver_io.predictor.condition[0].weight
    saved = [weight.detach().clone() for weight in inputs]
    with torch.no_grad():
        for weight in inputs:
            weight[:, -model.action_dim :] = 0
        ignores = probe(model)
        for weight, old in zip(inputs, saved):
            weight.copy_(old)
    for name in ("actions_in_tokens", "actions_in_prior", "actions_in_films"):
        assert ignores[name]["cost"] == pytest.approx(0, abs=1e-9), name


def test_intact_films_are_those_of_predict_future(model):
    clips = make_clips(model)
    errors = squared_error(predict(model, clips)["reconstructions"], normalise(clips.pixels[:, 2:])).double().mean(0)
    expected = [psnr(error) for error in errors.tolist()][GAIN_STEPS[0] - 1 :]
    for row in probe_films(model, clips, CPU, batch=2).values():
        assert row["intact"] == pytest.approx(sum(expected) / len(expected))


def test_one_component_alone_costs_nothing_where_all_are_alike(model):
    episodes = make_episodes(model)
    assert probe_sequences(model, episodes, FRAMES, CPU)["mixture_in_kl"]["cost"] != 0
    with weights(*model.prior.components_head.parameters(), factor=0.0):
        alike = probe_sequences(model, episodes, FRAMES, CPU)["mixture_in_kl"]
    assert alike["unit"] == "nats"
    assert alike["cost"] == pytest.approx(0, abs=1e-4)


def test_sequences_are_exchanged_with_those_of_other_episodes(model):
    for count, batch in ((2, 4), (3, 4), (5, 2), (7, 3), (9, 16)):
        episodes = make_episodes(model, count, length=11 + count)
        for i, episode in enumerate(episodes):
            episode["pixels"][:] = i
        seen = 0
        for part in interleave(episodes, FRAMES, batch):
            owner = part["pixels"][:, 0, 0, 0, 0]
            assert part.shape[1] == FRAMES
            assert (owner != owner.roll(1, 0)).all()
            seen += len(part)
        assert seen == count * ((11 + count) // FRAMES)
    rows = probe_sequences(model, make_episodes(model, 1), FRAMES, CPU)
    assert rows["context_in_tokens"]["cost"] is None  # no other episode
    assert rows["context_in_reconstruction"]["cost"] is None
    assert rows["attention_in_reconstruction"]["cost"] is not None
    with pytest.raises(ValueError, match="no sequence"):
        probe_sequences(model, make_episodes(model, 2, length=4), FRAMES, CPU)


def test_validation_logs_costs_and_leaves_random_numbers_alone(model):
    episodes = make_episodes(model)
    video = normalise(torch.stack([e["pixels"][:FRAMES] for e in episodes])).double()
    actions, is_init = (torch.stack([e[name][:FRAMES] for e in episodes]) for name in ("action", "is_init"))
    with torch.no_grad():
        outputs = model.forward_sequence(video, actions.double(), is_init)
        state, probes = torch.get_rng_state(), ValidationProbes()
        assert probes.compute() == {}
        probes.update(model, video[:1], actions[:1].double(), is_init[:1], outputs)  # no other sequence
        assert probes.compute() == {}
        probes.update(model, video, actions.double(), is_init, outputs)
    assert torch.equal(torch.get_rng_state(), state)
    logged, rows = probes.compute(), probe_sequences(model, [e[:FRAMES] for e in episodes], FRAMES, CPU)
    assert set(logged) == {*LOGGED, "probe_attention_from_uniform", "probe_context_spread", "probe_action_shuffle_ratio"}
    assert logged["probe_attention_db"] == pytest.approx(rows["attention_in_reconstruction"]["cost"])
    assert logged["probe_action_shuffle_ratio"] == pytest.approx(1, abs=0.1)
    assert logged["probe_action_shuffle_ratio"] != 1


def test_what_is_in_a_latent_is_read_out_of_it():
    generator = torch.Generator().manual_seed(0)
    known, new = torch.randn(2, 600, 3, generator=generator, dtype=torch.float64)

    def values(z):
        return torch.stack([2 * z[:, 0] - z[:, 1] + 3, z[:, 0].square(), torch.ones(len(z), dtype=z.dtype)], 1)

    linear = r_squared(read_linearly(known, values(known), new), values(new))
    near = r_squared(read_neighbours(known, values(known), new), values(new))
    assert linear[0] > 0.999
    assert linear[1] < 0.1 < 0.7 < near[1]  # folded: neighbours find it, a line does not
    assert near[0] > 0.9
    assert linear[2] is near[2] is None
    noise = torch.randn(600, 3, generator=generator, dtype=torch.float64)
    assert r_squared(read_linearly(noise, values(known), new), values(new))[0] < 0.3


def test_the_angle_is_that_of_the_line_from_cart_to_tip(model):
    up, right = torch.tensor([[10.0, 20], [0, 0], [10, 10]]), torch.tensor([[10.0, 20], [0, 0], [16, 20]])
    outside = torch.tensor([[-9.0, 20], [0, 0], [0, 20]])
    found, inside = quantities(torch.stack([up, right, outside]), ["cart", "pole_1", "pole_1/tip"], 32)
    assert found["cart_column"].tolist() == [10, 10, -9]
    assert found["pole_sine"][:2].tolist() == [0, 1]
    assert found["pole_cosine"][:2].tolist() == [1, 0]
    assert inside.tolist() == [True, True, False]
    assert list(quantities(torch.zeros(1, 1, 2), ["finger"], 32)[0]) == ["finger_column", "finger_row"]
    episodes = make_episodes(model)
    found = probe_latents(model, episodes[:2], episodes[2:], ("cart", "pole_1", "pole_1/tip"), CPU)
    assert set(found) == {"cart_column", "pole_sine", "pole_cosine"}
    for episode in episodes:
        episode["positions"][:] = -9
    assert probe_latents(model, episodes[:2], episodes[2:], ("a", "b", "c"), CPU).startswith("not measured: ")
