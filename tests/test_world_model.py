"""The joined model: parallel path against one-frame definition, causality, what the decoder may see, open-loop prediction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ACTIONS, make_batch, make_model

from aime_fast.layers import starts
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.multi_task_learning.loss_aggregator import TERMS

PER_FRAME = (
    "reconstructions", "latents", "posterior_mean", "posterior_logvar", "mixture_weights", "component_means", "component_logvars",
    "hidden", "context", "slot_maps", "attention", "attention_prior", "movement",
)  # fmt: skip


def loop_step(model, video, actions, is_init):
    state, outputs = model.initial_state(video.shape[0]), []
    for t in range(video.shape[1]):
        out, state = model.step(video[:, t], actions[:, t], state, is_init[:, t])
        outputs.append(out)
    return torch.stack(outputs, dim=1)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), frames=st.integers(1, 8), cuts=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 7)), max_size=3))
@torch.no_grad()
def test_step_looped_equals_forward_sequence(model, seed, frames, cuts):
    video, actions = make_batch(model, 2, frames, seed)
    is_init = torch.zeros(2, frames, dtype=torch.bool)
    for row, t in cuts:
        is_init[row, min(t, frames - 1)] = True
    parallel = model.forward_sequence(video, actions, is_init)
    looped = loop_step(model, video, actions, is_init)
    assert torch.equal(parallel["tokens"], looped["tokens"])
    for name in PER_FRAME:
        torch.testing.assert_close(looped[name], parallel[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("fields", [{"prior_context": "current"}, {"lstm_layers": 2}, {"share_codebook": True}, {"likelihood": "mol"}])
@torch.no_grad()
def test_step_looped_equals_forward_sequence_in_every_variant(fields):
    model = make_model(**fields)
    video, actions = make_batch(model, 2, 4)
    is_init = torch.tensor([[True, False, False, False], [False, False, True, False]])
    parallel, looped = model.forward_sequence(video, actions, is_init), loop_step(model, video, actions, is_init)
    for name in PER_FRAME:
        torch.testing.assert_close(looped[name], parallel[name], rtol=1e-9, atol=1e-10)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), s=st.integers(1, 6))
@torch.no_grad()
def test_nothing_sees_a_later_frame_or_action(model, seed, s):
    """Changing frame s, and the action before it, leaves everything before s untouched; the prior of s itself too."""
    video, actions = make_batch(model, 1, 7, seed)
    other_video, other_actions = video.clone(), actions.clone()
    other_video[:, s] = -video[:, s]
    other_actions[:, s] = -actions[:, s]
    a, b = model.forward_sequence(video, actions), model.forward_sequence(other_video, other_actions)
    assert torch.equal(a["tokens"][:, :s], b["tokens"][:, :s])
    for name in PER_FRAME:
        torch.testing.assert_close(a[name][:, :s], b[name][:, :s], rtol=1e-9, atol=1e-11)
    for name in ("mixture_weights", "component_means", "attention_prior"):
        torch.testing.assert_close(a[name][:, s], b[name][:, s], rtol=1e-9, atol=1e-11)
    for name in ("context", "latents", "hidden", "attention", "reconstructions"):  # and frame s does matter from s on
        assert (a[name][:, s] - b[name][:, s]).abs().max() > 1e-6, name


@torch.no_grad()
def test_an_episode_start_inside_a_sequence_forgets_what_was_before(model):
    video, actions = make_batch(model, 1, 6)
    is_init = torch.zeros(1, 6, dtype=torch.bool)
    is_init[:, 3] = True
    joined = model.forward_sequence(video, actions, is_init)
    alone = model.forward_sequence(video[:, 3:], actions[:, 3:])
    for name in PER_FRAME:
        torch.testing.assert_close(joined[name][:, 3:], alone[name], rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_decoder_sees_nothing_but_latent_and_attention(model):
    video, actions = make_batch(model, 2, 3)
    out = model.forward_sequence(video, actions)
    redrawn = model.decoder(out["latents"].flatten(0, 1), out["attention"].flatten(0, 1)).view_as(out["reconstructions"])
    torch.testing.assert_close(redrawn, out["reconstructions"], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_attention_dropout_gives_uniform_maps_to_whole_sequences_in_training_only():
    model = make_model(attention_dropout=0.5)
    video, actions = make_batch(model, 16, 2)
    start = starts(None, 16, 2, video.device)
    maps = model.infer(video, actions).maps.attention
    assert torch.equal(model.with_dropout(maps, start.shape), maps)
    maps_used = model.train().with_dropout(maps, start.shape).unflatten(0, (16, 2))
    uniform = (maps_used == model.attention.uniform(1).to(maps.dtype)).flatten(2).all(2)
    assert torch.equal(uniform[:, 0], uniform[:, 1])
    assert 0 < uniform[:, 0].sum() < 16
    assert torch.equal(maps_used[~uniform[:, 0]], maps.unflatten(0, (16, 2))[~uniform[:, 0]])


@pytest.mark.parametrize("fusion", ["weighted", "max", "gated"])
@torch.no_grad()
def test_attention_maps_and_weights_sum_to_one(fusion):
    model = make_model(attention_fusion=fusion)
    video, actions = make_batch(model, 2, 4)
    out = model.forward_sequence(video, actions)
    for name in ("slot_maps", "attention", "attention_prior"):
        mass = out[name].sum((-2, -1))
        torch.testing.assert_close(mass, torch.ones_like(mass))
        assert (out[name] >= 0).all(), name
    torch.testing.assert_close(out["mixture_weights"].sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_losses_are_complete_finite_and_reach_every_parameter():
    model = make_model(auxiliary_share=1.0).train()
    video, actions = make_batch(model, 6, 5)  # enough that some tokens are hidden and some are not
    ema = make_model(seed=1)
    brought = torch.randn(6, 5, 1, dtype=torch.float64), torch.ones(6, 5, 1, dtype=torch.float64)
    outputs = model.forward_sequence(video, actions, ema=ema, brought=brought)
    assert outputs["gram"] > 0
    without = model.forward_sequence(video, actions)
    assert without["gram"] == without["reward"] == without["continuation"] == 0
    losses, tasks = LossAggregator().compute_losses(outputs, beta=1.0)
    assert set(TERMS) <= set(losses)
    assert len(tasks) == 4
    assert all(torch.isfinite(value) for value in losses.values())
    parameters = model.generator_parameters()
    reached = [False] * len(parameters)
    for task in tasks:
        gradients = torch.autograd.grad(task, parameters, retain_graph=True, allow_unused=True)
        reached = [r or (g is not None and bool(g.abs().sum() > 0)) for r, g in zip(reached, gradients)]
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p, r in zip(parameters, reached) if not r] == []
    total, parts = model.discriminator_loss(outputs, video, gradient_penalty=1.0)
    assert len(parts) == 2
    critics = torch.autograd.grad(total, model.discriminator_parameters())
    assert all(g.abs().sum() > 0 for g in critics)


@torch.no_grad()
def test_the_roll_out_counts_by_its_warm_up(model):
    outputs = model.forward_sequence(*make_batch(model, 2, 4))
    elbos = [LossAggregator().compute_losses(outputs, overshoot=share)[0]["elbo"] for share in (0.0, 0.5, 1.0)]
    assert elbos[0] != elbos[2]
    torch.testing.assert_close(elbos[1], (elbos[0] + elbos[2]) / 2)


def test_missing_loss_term_is_named(model):
    video, actions = make_batch(model, 1, 2)
    with torch.no_grad():
        outputs = model.forward_sequence(video, actions)
    with pytest.raises(KeyError, match="kl_z"):
        LossAggregator().compute_losses(outputs.exclude("kl_z"))


def test_uint8_and_float_frames_are_the_same(model):
    pixels = torch.randint(0, 256, (1, 2, 3, model.image_size, model.image_size), dtype=torch.uint8)
    actions = torch.zeros(1, 2, ACTIONS)
    torch.testing.assert_close(model.reconstruct(pixels, actions), model.reconstruct(pixels.double() / 127.5 - 1, actions))


def test_wrong_shapes_are_named(model):
    video, actions = make_batch(model, 2, 3)
    with pytest.raises(ValueError, match=r"observations have shape.*expected \[B, T, 3, 32, 32\]"):
        model.forward_sequence(video[..., :16], actions)
    with pytest.raises(ValueError, match=r"actions have shape \(2, 3, 1\), expected \(2, 3, 2\)"):
        model.forward_sequence(video, actions[..., :1])
    with pytest.raises(ValueError, match="at least one frame"):
        model.predict_future(video[:, :0], actions[:, :0], actions)


@pytest.mark.parametrize("sample", [False, True])
def test_predict_future_runs_past_the_trained_length_and_obeys_actions(model, sample):
    video, actions = make_batch(model, 3, 4)
    future = make_batch(model, 3, 12, seed=1)[1]  # 16 frames in all; trained on 5
    other = future.clone()
    other[:, 6] = -future[:, 6]

    def predict(v, a, f):
        torch.manual_seed(0)
        return model.predict_future(v, a, f, sample=sample)

    a, b = predict(video, actions, future), predict(video, actions, other)
    assert a["reconstructions"].shape == (3, 12, *video.shape[2:])
    for name in ("reconstructions", "latents", "mixture_weights", "attention"):
        assert torch.isfinite(a[name]).all()
        torch.testing.assert_close(a[name][:, :7], b[name][:, :7])  # action 6 is taken after frame 6
    assert (a["latents"][:, 7:] - b["latents"][:, 7:]).abs().max() > 0
    if not sample:  # rows of a batch do not meet, and nothing is random
        alone = predict(video[1:2], actions[1:2], future[1:2])
        torch.testing.assert_close(alone["reconstructions"], a["reconstructions"][1:2])


def test_predict_future_continues_step(model):
    """Imagination starts exactly where the posterior's recurrence ends."""
    video, actions = make_batch(model, 1, 3)
    future = make_batch(model, 1, 1, seed=1)[1]
    with torch.no_grad():
        state = model.initial_state(1)
        for t in range(3):
            _, state = model.step(video[:, t], actions[:, t], state)
        imagined, _ = model.imagine(future[:, 0], state)
    predicted = model.predict_future(video, actions, future)
    torch.testing.assert_close(predicted["reconstructions"][:, 0], imagined["reconstructions"])


def test_encode_and_extract_context_agree_with_forward_sequence(model):
    video, actions = make_batch(model, 2, 4)
    with torch.no_grad():
        out = model.forward_sequence(video, actions)
    encoded = model.encode(video)
    torch.testing.assert_close(encoded["posterior_mean"], out["posterior_mean"])
    torch.testing.assert_close(model.extract_context(video), out["context"])
    torch.testing.assert_close(model.reconstruct(video, actions), out["reconstructions"])


INFERENCE = {
    "predict_future": lambda m, video, actions: m.predict_future(video, actions, actions),
    "encode": lambda m, video, actions: m.encode(video),
    "reconstruct": lambda m, video, actions: m.reconstruct(video, actions),
    "extract_context": lambda m, video, actions: m.extract_context(video),
    "infer": lambda m, video, actions: m.infer(video, actions),
    "step": lambda m, video, actions: m.step(video[:, 0], actions[:, 0], m.initial_state(len(video))),
    "tokenizer": lambda m, video, actions: m.perceiver_io.tokenizer.encode(video),
    "generate_autoregressive": lambda m, video, actions: m.perceiver_io.generate_autoregressive(video[:, :3], actions, 2),
}


def codebook_state(model) -> dict[str, torch.Tensor]:
    perceiver = model.perceiver_io
    return {name: value.clone() for name, value in perceiver.tokenizer.quantizer.state_dict().items()} | {
        "mean": perceiver.mean_code.clone()
    }


@pytest.mark.parametrize("name", INFERENCE)
@pytest.mark.parametrize("fresh", [False, True])
def test_inference_in_training_mode_leaves_the_codebook_alone(name, fresh):
    model = make_model().train()
    if fresh:
        model.perceiver_io.tokenizer.quantizer.initialised.zero_()
    video, actions = make_batch(model, 2, 4, seed=5)
    before = codebook_state(model)
    INFERENCE[name](model, video, actions)
    assert all(torch.equal(before[key], value) for key, value in codebook_state(model).items())


def test_forward_sequence_learns_after_context_and_decoder_have_read_the_codebook():
    model = make_model().train()
    video, actions = make_batch(model, 2, 4, seed=5)
    before = codebook_state(model)
    with torch.no_grad():
        expected = model.extract_context(video)
        out = model.forward_sequence(video, actions)
    assert any(not torch.equal(before[key], value) for key, value in codebook_state(model).items())
    torch.testing.assert_close(out["context"], expected, rtol=1e-12, atol=1e-12)


def test_public_constructor_takes_the_arguments_that_users_type():
    from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

    small = dict(num_latents=4, num_latent_channels=16, predictor_dim=16, predictor_layers=1, codebook_size=16, code_dim=4)
    narrow = dict(tokenizer_channels=(8, 8), encoder_channels=(8, 8, 8), discriminator_channels=(8, 8), blocks_per_level=1)
    model = DPGMMVariationalRecurrentAutoencoder(
        max_components=5, latent_dim=7, hidden_dim=12, context_dim=20, image_size=84, action_dim=6, attention_dim=16,
        num_attention_slots=2, sequence_length=3, **small, **narrow,
    ).eval()  # fmt: skip
    pixels = torch.randint(0, 256, (1, 3, 3, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        out = model.forward_sequence(pixels, torch.zeros(1, 3, 6))
    assert out["reconstructions"].shape == (1, 3, 3, 84, 84)
    assert out["attention"].shape == (1, 3, 11, 11)
    assert out["tokens"].shape == (1, 3, 11, 11, 4)
    assert out["slot_maps"].shape == (1, 3, 2, 11, 11)


@torch.no_grad()
def test_some_sequences_of_an_inference_are_those_inferred_alone():
    model = make_model()
    video, actions = make_batch(model, 3, 4)
    whole = model.infer(video, actions).rows(slice(1, 3), (3, 4))
    alone = model.infer(video[1:], actions[1:])
    for name in ("latents", "delta", "context", "hidden", "lstm", "attention_before"):
        torch.testing.assert_close(getattr(whole, name), getattr(alone, name))
    torch.testing.assert_close(whole.maps.slot_maps, alone.maps.slot_maps)
    torch.testing.assert_close(whole.prior.means, alone.prior.means)


def test_in_training_dear_tasks_see_a_share_of_the_sequences():
    model = make_model(decoded_share=0.5, auxiliary_share=0.25).train()
    video, actions = make_batch(model, 4, 3)
    out = model.infer_and_score(video, actions)
    assert out["reconstructions"].shape[:2] == (2, 3)
    assert out["drawn"].shape[:2] == (1, 3)
    assert out["latents"].shape[:2] == out["attention"].shape[:2] == (4, 3)
    model.discriminator_loss(out, video)
    model.eval()
    assert model.infer_and_score(video, actions)["reconstructions"].shape[:2] == (4, 3)
