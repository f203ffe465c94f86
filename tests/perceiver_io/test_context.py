"""Context and generation frame by frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_batch, make_model

from aime_fast.layers import starts


@settings(deadline=None, max_examples=10)
@given(cut=st.integers(1, 11), mark=st.integers(0, 11), seed=st.integers(0, 1000))
@torch.no_grad()
def test_perception_in_pieces_equals_perception_at_once(model, cut, mark, seed):
    """12 frames, a window of 5: the first piece may be longer or shorter than the window, and an episode may begin anywhere."""
    perceiver = model.perceiver_io
    video, _ = make_batch(model, 2, 12, seed)
    is_init = torch.zeros(2, 12, dtype=torch.bool)
    is_init[1, mark] = True
    start = starts(is_init, 2, 12, video.device)
    tokens = perceiver.tokenizer.tokenize(video, start).codes
    cache, pieces = perceiver.empty_cache(2), []
    for piece in (slice(0, cut), slice(cut, 12)):
        *observed, cache = perceiver.observe(video[:, piece], cache, is_init[:, piece])
        pieces.append(observed)
    assert torch.equal(torch.cat([codes for codes, _ in pieces], 1), tokens)
    context = torch.cat([context for _, context in pieces], 1)
    torch.testing.assert_close(context, perceiver.context(tokens, start), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("refinement_steps", [0, 3])
def test_generation_runs_past_the_trained_length_is_causal_in_actions_and_deterministic(refinement_steps):
    model = make_model(refinement_steps=refinement_steps)
    perceiver = model.perceiver_io
    video, _ = make_batch(model, 2, 3)
    actions = make_batch(model, 2, 14, seed=2)[1]
    tokens, _, _ = perceiver.tokenizer.encode(video)
    a = perceiver.generate_tokens(tokens, actions, 12, temperature=0)
    other = actions.clone()
    other[:, 7] *= -1
    b = perceiver.generate_tokens(tokens, other, 12, temperature=0)
    assert a.shape == (2, 12, 4, 4, 2)
    assert torch.equal(a[:, :5], b[:, :5])  # action 7 decides frame 8, the generated frame 5
    assert torch.equal(perceiver.generate_tokens(tokens[:1], actions[:1], 12, temperature=0), a[:1])
    sampled = perceiver.generate_autoregressive(video, actions, 4, temperature=1.0, top_p=0.9)
    assert sampled.shape == (2, 4, 3, 32, 32)
    assert torch.isfinite(sampled).all()
    with pytest.raises(ValueError, match="20 frames after 3 need 22 actions, got 14"):
        perceiver.generate_tokens(tokens, actions, 20)


def test_recall_trains_the_context_and_not_what_is_recalled(model):
    perceiver, z = model.perceiver_io, model.latent_dim
    context, means, delta = (torch.randn(2, 3, width, dtype=torch.float64, requires_grad=True) for width in (20, z, z))
    loss = perceiver.recall_loss(context, means, delta)
    read = perceiver.recall(context)
    expected = 0.5 * ((read[..., :z] - means).square().mean() + (read[..., z:] - 5 * delta).square().mean())
    torch.testing.assert_close(loss, expected)
    of_context, of_means, of_delta = torch.autograd.grad(loss, (context, means, delta), allow_unused=True)
    assert of_context.abs().sum() > 0
    assert of_means is None
    assert of_delta is None


def test_means_follow_the_tokens_and_contexts_of_batches():
    perceiver = make_model().train().perceiver_io
    video, _ = make_batch(make_model(), 2, 4)
    start = starts(None, 2, 4, video.device)
    tokens = perceiver.tokenizer.tokenize(video, start, learn=True)
    seen = perceiver.tokenizer.embed(tokens.codes).flatten(2, 3).flatten(0, 1).mean(0)  # by the codebook of before the update
    before = perceiver.mean_code.clone()
    context, mean = perceiver.context(tokens.codes, start), perceiver.mean_context.clone()
    perceiver.learn_context(context)
    perceiver.learn(tokens)
    torch.testing.assert_close(perceiver.mean_code, 0.9 * before + 0.1 * seen.to(before.dtype))
    torch.testing.assert_close(perceiver.mean_context, 0.9 * mean + 0.1 * context.detach().mean((0, 1)))


ENTRANCES = {
    "model": lambda m, x: m.forward_sequence(x, torch.zeros(1, 3, m.action_dim))["context"],
    "encode": lambda m, x: m.encode(x)["context"],
    "context": lambda m, x: m.perceiver_io.extract_context(x),
    "tokenizer": lambda m, x: m.perceiver_io.tokenizer.encode(x)[0],
    "generation": lambda m, x: m.perceiver_io.generate_autoregressive(x, torch.zeros(1, 4, m.action_dim), 1, temperature=0.0),
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@torch.no_grad()
def test_every_entrance_takes_bytes_and_refuses_floats_out_of_range(model, entrance):
    pixels = torch.randint(0, 256, (1, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = pixels.double() / 127.5 - 1
    torch.testing.assert_close(ENTRANCES[entrance](model, pixels), ENTRANCES[entrance](model, frames))
    for wrong in (pixels.double(), frames * float("nan"), frames + 1.0):
        with pytest.raises(ValueError, match=r"floats in \[.*expected \[-1, 1\]"):
            ENTRANCES[entrance](model, wrong)
    with pytest.raises(ValueError, match=r"int64, expected uint8"):
        ENTRANCES[entrance](model, pixels.long())


def test_rare_codes_are_read_first(model):
    """Tokens of one rare code outweigh all others in what the context reads, whatever they are."""
    quantizer = model.perceiver_io.tokenizer.quantizer
    codes = torch.zeros(1, 1, *[model.perceiver_io.tokenizer.grid] * 2, quantizer.heads, dtype=torch.int64)
    quantizer.cluster_size[:] = 1.0
    quantizer.cluster_size[:, 0] = 1e4
    rare = codes.clone()
    rare[0, 0, 1, 2] = 3
    surprise = quantizer.surprise(rare)
    assert surprise.shape == rare.shape[:-1]
    torch.testing.assert_close(surprise[0, 0, 1, 2] - surprise[0, 0, 0, 0], torch.tensor(1e4, dtype=surprise.dtype).log())
