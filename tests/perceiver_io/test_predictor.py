"""The token predictor: what it learns, and how it samples."""

from __future__ import annotations

import pytest
import torch
from models import make_batch, make_model

from aime_fast.layers import starts
from aime_fast.perceiver_io.predictor import sample_codes


def test_predictor_learns_to_copy_and_counts_only_frames_with_a_past():
    model = make_model().train()
    predictor = model.perceiver_io.predictor.float()
    predictor.corruption = predictor.hidden_share = 0.0
    torch.manual_seed(0)
    tokens = torch.randint(32, (2, 1, 4, 4, 2)).expand(2, 4, 4, 4, 2)
    context, actions = torch.zeros(2, 4, 20), torch.zeros(2, 4, 2)
    start = torch.zeros(2, 4, dtype=torch.bool)
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    for _ in range(60):
        loss, accuracy = predictor.loss(tokens, context, actions, start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy > 0.95
    assert loss < 0.3
    everywhere_cut = torch.ones(2, 4, dtype=torch.bool)
    assert predictor.loss(tokens, context, actions, everywhere_cut)[0] == 0


def test_top_p_keeps_the_nucleus_and_zero_temperature_the_mode():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    torch.manual_seed(0)
    assert sample_codes(logits, temperature=0).unique().tolist() == [0]
    assert sample_codes(logits, top_p=0.6).unique().tolist() == [0, 1]
    frequency = sample_codes(logits).bincount(minlength=4) / 4000
    torch.testing.assert_close(frequency, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="top_p"):
        sample_codes(logits, top_p=0.0)


@torch.no_grad()
def test_hidden_tokens_are_told_by_the_context_alone(model):
    predictor = model.perceiver_io.predictor
    torch.manual_seed(0)
    tokens, context, actions = torch.randint(32, (3, 2, 4, 4, 2)), torch.randn(3, 2, 20).double(), torch.randn(3, 2, 2).double()
    shown = torch.tensor([True, False, True])
    logits = predictor(tokens, context, actions, shown=shown)
    changed = predictor(tokens.roll(1, 0), context, actions, shown=shown)
    torch.testing.assert_close(logits[0], predictor(tokens, context, actions)[0])
    torch.testing.assert_close(logits[1], changed[1], rtol=0, atol=0)
    assert not torch.allclose(logits[0], changed[0])
    assert not torch.allclose(logits[1], predictor(tokens, context.roll(1, 0), actions, shown=shown)[1])


def test_in_training_a_share_of_the_sequences_is_hidden(monkeypatch):
    model = make_model().train()
    predictor = model.perceiver_io.predictor
    calls, forward = [], predictor.forward
    monkeypatch.setattr(predictor, "forward", lambda *given: calls.append(given[5]) or forward(*given))
    tokens = torch.randint(32, (64, 2, 4, 4, 2))
    given = tokens, torch.zeros(64, 2, 20).double(), torch.zeros(64, 2, 2).double(), torch.zeros(64, 2, dtype=torch.bool)
    for hidden, least, most in ((0.0, 64, 64), (0.5, 16, 48), (1.0, 0, 0)):
        predictor.hidden_share = hidden
        predictor.loss(*given)
        assert least <= calls[-1].sum() <= most
    model.eval()
    predictor.loss(*given)
    assert calls[-1] is None


def test_drawn_tokens_are_of_the_codebook_of_their_targets(monkeypatch):
    model = make_model().train()
    perceiver, (video, actions) = model.perceiver_io, make_batch(model, 2, 3)
    start, given = starts(None, 2, 3, video.device), []
    tokens = perceiver.tokenizer.tokenize(video, start, learn=True)
    codebook, predict = perceiver.tokenizer.quantizer.codebook, perceiver.predictor.loss
    monkeypatch.setattr(perceiver.tokenizer, "learn", lambda tokens: codebook.copy_(codebook.flip(1)))
    monkeypatch.setattr(perceiver.predictor, "loss", lambda *inputs: given.append(inputs[-1]) or predict(*inputs))
    means, context = torch.zeros(2, 3, model.latent_dim).double(), perceiver.context(tokens.codes, start)
    perceiver.score(video, tokens, context, actions, start, slice(2), means, means, pictures=video)
    assert torch.equal(given[0], tokens.codes)
    assert not torch.equal(perceiver.tokenizer.tokenize(video, start).codes, tokens.codes)


def test_hidden_sequences_train_the_context_and_have_no_picture():
    model = make_model().train()
    perceiver, predictor = model.perceiver_io, model.perceiver_io.predictor
    video, actions = make_batch(model, 4, 3)
    codes, start = perceiver.tokenizer.encode(video)[0], starts(None, 4, 3, video.device)
    drawn, other = codes.roll(1, 0), codes.roll(2, 0)
    predictor.hidden_share = 1.0

    def loss(drawn):
        torch.manual_seed(1)
        return predictor.loss(codes, perceiver.context(codes, start), actions, start, 0.0, perceiver.context, drawn)[0]

    torch.testing.assert_close(loss(drawn), loss(other), rtol=0, atol=0)
    gradient = torch.autograd.grad(loss(drawn), (perceiver.dense.weight, perceiver.read.attention.query.weight), allow_unused=True)
    assert gradient[0].abs().sum() > 0
    predictor.hidden_share = 0.0
    assert loss(drawn) != loss(other)


def test_the_context_of_replaced_tokens_is_computed_from_them(monkeypatch):
    """With own tokens and random ones the predictor must not read the true frame through the context."""
    model = make_model().train()
    perceiver, predictor = model.perceiver_io, model.perceiver_io.predictor
    predictor.corruption = 0.3
    video, actions = make_batch(model, 2, 5)
    with torch.no_grad():
        tokens, _, _ = perceiver.tokenizer.encode(video)
        start = starts(None, 2, 5, video.device)
        context = perceiver.context(tokens, start)
    calls, forward = [], predictor.forward
    monkeypatch.setattr(predictor, "forward", lambda *given: calls.append(given) or forward(*given))
    predictor.loss(tokens, context, actions, start, 1.0, perceiver.context)
    given, read, *_ = calls[-1]
    assert not torch.equal(given, tokens[:, :-1])
    torch.testing.assert_close(read, perceiver.context(given, start[:, :-1]))
    assert not torch.allclose(read, context[:, :-1])
    model.eval()
    predictor.loss(tokens, context, actions, start, 1.0, perceiver.context)
    assert torch.equal(calls[-1][0], tokens[:, :-1])
    assert torch.equal(calls[-1][1], context[:, :-1])


def test_drawn_tokens_tell_the_next_and_without_them_it_still_predicts():
    """Codes that those of a picture tell and nothing else tells are learnt from them, though never the same; half of the codes stay."""
    model = make_model().train()
    predictor = model.perceiver_io.predictor.float()
    predictor.corruption = 0.0
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    context, actions, start = torch.zeros(4, 3, 20), torch.zeros(4, 3, 2), torch.zeros(4, 3, dtype=torch.bool)

    def batch():
        bright = (torch.rand(4, 3, 4, 4) < 0.5).long()  # of each place
        stays = torch.full((4, 3, 4, 4), 7)
        return torch.stack([bright, stays], -1), torch.stack([1 - bright, stays], -1)

    for _ in range(120):
        tokens, drawn = batch()
        loss, _ = predictor.loss(tokens, context, actions, start, 0.0, None, drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    tokens, drawn = batch()
    with torch.no_grad():
        assert predictor.loss(tokens, context, actions, start, 0.0, None, drawn)[1] > 0.95
        assert 0.6 < predictor.loss(tokens, context, actions, start)[1] < 0.9
        sampled = predictor.sample(tokens[:, 0], context[:, 0], actions[:, 0], 0.0, drawn=drawn[:, 1])
    assert (sampled == tokens[:, 1]).float().mean() > 0.95
