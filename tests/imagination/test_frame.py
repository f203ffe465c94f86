"""One frame at a time: caches against computations without any, fixed shapes, compiled and captured frames against plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from models import ACTIONS, debug_config, make_batch, make_model
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from aime_fast.imagination.sequence import recurrent_input
from aime_fast.layers import starts
from aime_fast.perceiver_io.context import next_tokens
from aime_fast.runtime.roll_out import RollOut
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

FRAMES = 14  # more than the window of 5 frames and than two layers of attention can reach back


@torch.no_grad()
def predict_without_caches(model, video, actions, future):
    """`predict_future` by the parallel functions alone, each run over the whole video again for every frame."""
    inferred = model.forward_sequence(video, actions)
    z, attention, h = inferred["latents"], inferred["attention"][:, -1], inferred["hidden"]
    context = model.extract_context(video)
    decoded = []
    for t in range(future.shape[1]):
        delta = z[:, -1] - z[:, -2] if z.shape[1] > 1 else torch.zeros_like(z[:, -1])
        p = model.prior(h[:, -1], context[:, -1], z[:, -1], delta, sample=False)
        predicted = model.attention.prior(attention, h[:, -1], z[:, -1])
        attention = predicted.log_attention.exp()
        z = torch.cat([z, p.sample(False)[:, None]], 1)
        context = torch.cat([context, model.perceiver_io.mean_context.expand_as(context[:, -1:])], 1)
        decoded.append(model.decoder.likelihood.mean(model.decoder(z[:, -1], attention)))
        actions = torch.cat([actions, future[:, t : t + 1]], 1)
        deltas = torch.diff(z, dim=1, prepend=z[:, :1])
        h, _ = model.recurrence(recurrent_input(z, deltas, context, actions), starts(None, *z.shape[:2], z.device))
    return torch.stack(decoded, 1), z[:, -future.shape[1] :], context


@pytest.mark.parametrize("observed", [1, 7])
@torch.no_grad()
def test_predict_future_equals_a_computation_without_caches(model, observed):
    video, actions = make_batch(model, 2, observed)
    future = make_batch(model, 2, FRAMES, seed=1)[1]
    decoded, latents, context = predict_without_caches(model, video, actions, future)
    predicted = model.predict_future(video, actions, future)
    torch.testing.assert_close(predicted["reconstructions"], decoded, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(predicted["latents"], latents, rtol=1e-9, atol=1e-10)

    state, contexts = model.initial_state(2), []
    for t in range(observed):
        _, state = model.step(video[:, t], actions[:, t], state)
        contexts.append(state.context)
    for t, action in enumerate(future.unbind(1)):
        out, state = model.imagine(action, state)
        contexts.append(state.context)
        for name in ("rewards", "continues"):  # of this action, of the frame that it follows
            torch.testing.assert_close(predicted[name][:, t], out[name], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.stack(contexts, 1), context, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_generated_tokens_equal_those_without_a_cache(model):
    perceiver, actions = copy.deepcopy(model.perceiver_io), make_batch(model, 2, FRAMES + 2)[1]
    perceiver.predictor.stay.bias.zero_()  # untrained, it would repeat every token
    tokens, _, _ = perceiver.tokenizer.encode(make_batch(model, 2, 3)[0])
    cached = perceiver.generate_tokens(tokens, actions, FRAMES, temperature=0)
    for t in range(2, FRAMES + 2):
        context = perceiver.context(tokens, starts(None, *tokens.shape[:2], tokens.device))[:, -1]
        tokens = torch.cat([tokens, perceiver.predictor.sample(tokens[:, -1], context, actions[:, t], 0.0)[:, None]], 1)
    assert torch.equal(cached, tokens[:, 3:])
    assert len(cached.unique(dim=1).unbind(1)) > 1


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_layout_of_the_state_never_changes(model, batch):
    def layout(state):
        return [(x.shape, x.dtype, x.stride()) for x in pytree.tree_leaves(state)]

    video, actions = make_batch(model, batch, 1)
    empty = model.initial_state(batch)
    _, observed = model.step(video[:, 0], actions[:, 0], empty)
    _, imagined = model.imagine(actions[:, 0], observed)
    assert layout(empty) == layout(observed) == layout(imagined)
    assert empty.cache.context.known.sum() == 0
    assert imagined.cache.context.known.sum() == batch  # the cache of perception is of observed frames alone


@torch.no_grad()
def test_imagination_compiles_once_into_one_graph(model):
    video, actions = make_batch(model, 2, 3)
    future = make_batch(model, 2, 8, seed=1)[1]
    state = model.initial_state(2)
    _, state = model.step(video[:, 0], actions[:, 0], state)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model.imagine, backend="aot_eager", fullgraph=True, dynamic=False)
    expected = state
    for action in future.unbind(1):
        out, state = compiled(action, state)
        plain, expected = model.imagine(action, expected)
        torch.testing.assert_close(out["reconstructions"], plain["reconstructions"], rtol=1e-9, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("refinement_steps", [0, 2])
@torch.no_grad()
def test_generation_compiles_once_into_one_graph(refinement_steps):
    perceiver = make_model(refinement_steps=refinement_steps).perceiver_io
    tokens = torch.randint(perceiver.tokenizer.quantizer.codebook_size, (2, 1, 4, 4, 2))
    actions = torch.rand(2, 20, ACTIONS, dtype=torch.float64)
    plain = perceiver.generate_tokens(tokens, actions, 20, temperature=0)
    torch._dynamo.reset()
    counters.clear()
    perceiver.roll_out = RollOut(torch.compile(next_tokens, backend="aot_eager", fullgraph=True, dynamic=False))
    for frames in (20, 6):
        assert torch.equal(perceiver.generate_tokens(tokens, actions[:, :frames], frames, temperature=0), plain[:, :frames])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["capture", "graph"])
@torch.no_grad()
def test_captured_imagination_equals_the_plain_one(mode):
    """For two batch sizes, again after the weights have changed in place, and with other noise in every frame."""
    model = DPGMMVariationalRecurrentAutoencoder.from_config(debug_config(), ACTIONS).cuda().eval()
    captured = copy.deepcopy(model)
    captured.compile_imagination(mode)
    for batch in (2, 1, 2):
        video, actions = (x.float().cuda() for x in make_batch(model, batch, 3))
        future = make_batch(model, batch, FRAMES, seed=1)[1].float().cuda()
        for name, value in model.predict_future(video, actions, future).items():
            torch.testing.assert_close(
                captured.predict_future(video, actions, future)[name], value, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
        tokens = model.perceiver_io.tokenizer.encode(video)[0]
        plain, replayed = (m.perceiver_io.generate_tokens(tokens, future, 5, temperature=0) for m in (model, captured))
        assert (plain == replayed).float().mean() > 0.9  # codes are discrete: the nearest of two may change with rounding
        sampled = captured.predict_future(video, actions, future, sample=True)["latents"]
        assert (sampled[:, 1:] - sampled[:, :-1]).abs().amax(-1).min() > 0
        for parameter, twin in zip(model.parameters(), captured.parameters()):
            noise = 0.02 * torch.randn_like(parameter)
            parameter += noise
            twin += noise
    assert len(captured.roll_out._graphs.by_key) == 4  # two batch sizes, with and without noise
