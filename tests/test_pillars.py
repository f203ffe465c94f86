"""Parts of the pillars alone: causal convolution, tokens, predictor, recurrence, likelihoods, slots."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make_batch, make_model
from torch import nn

from aime_fast.attention_schema.schema import attention_kl, map_entropy, slot_overlap
from aime_fast.encoder_decoder.encoder import MEAN_BOUND, bounded_mean
from aime_fast.encoder_decoder.keypoints import GaussianHeatmaps, SpatialSoftmax
from aime_fast.encoder_decoder.likelihoods import Gaussian, MixtureOfLogistics
from aime_fast.generative_prior import DPGMMPrior
from aime_fast.layers import emphasise_last, episode_mask, halvings, starts
from aime_fast.multi_task_learning.losses import gaussian_log_prob, mixture_log_prob
from aime_fast.perceiver_io.predictor import draw
from aime_fast.perceiver_io.tokenizer import CausalConv3d
from aime_fast.temporal_dynamics import LSTMLayer


@pytest.mark.parametrize("stride", [1, 2])
def test_causal_convolution_is_conv3d_padded_on_the_left(stride):
    torch.manual_seed(0)
    ours = CausalConv3d(3, 5, stride).double()
    theirs = nn.Conv3d(3, 5, (2, 3, 3), (1, stride, stride), padding=(0, 1, 1)).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.stack([ours.before.weight, ours.now.weight], dim=2))
        theirs.bias.copy_(ours.now.bias)
    x = torch.randn(2, 4, 3, 9, 9, dtype=torch.float64)
    start = starts(None, 2, 4, x.device)
    padded = nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 1, 0))
    expected = theirs(padded).transpose(1, 2)
    torch.testing.assert_close(ours(x.flatten(0, 1), start)[0].unflatten(0, (2, 4)), expected)


@torch.no_grad()
def test_decoded_tokens_are_causal_and_need_tokens_alone(model):
    tokenizer = model.perceiver_io.tokenizer
    video, _ = make_batch(model, 1, 6)
    tokens, loss, perplexity = tokenizer.encode(video)
    assert tokens.shape == (1, 6, 4, 4, 2)
    assert tokens.dtype == torch.int64
    assert torch.isfinite(loss)
    assert 1 <= perplexity <= 32
    quantized = tokenizer.tokenize(video).quantized
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.decode_vectors(quantized))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 32
    a, b = tokenizer.decode(tokens), tokenizer.decode(changed)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3] - b[:, 3]).abs().max() > 1e-6


@pytest.mark.parametrize("refinement_steps", [0, 3])
def test_generation_runs_past_the_trained_length_is_causal_in_actions_and_deterministic(refinement_steps):
    model = make_model(refinement_steps=refinement_steps)
    perceiver = model.perceiver_io
    video, _ = make_batch(model, 2, 3)
    actions = make_batch(model, 2, 14, seed=2)[1]
    tokens = perceiver.tokenizer.tokenize(video).codes
    a = perceiver.generate_tokens(tokens, actions, 12, temperature=0)
    other = actions.clone()
    other[:, 7] *= -1
    b = perceiver.generate_tokens(tokens, other, 12, temperature=0)
    assert a.shape == (2, 12, 4, 4, 2)
    assert torch.equal(a[:, :5], b[:, :5])  # action 7 decides frame 8, the generated frame 5
    assert torch.equal(perceiver.generate_tokens(tokens[:1], actions[:1], 12, temperature=0), a[:1])
    drawn = perceiver.generate_autoregressive(video, actions, 4, temperature=1.0, top_p=0.9)
    assert drawn.shape == (2, 4, 3, 32, 32)
    assert torch.isfinite(drawn).all()
    with pytest.raises(ValueError, match="20 frames after 3 need 22 actions, got 14"):
        perceiver.generate_tokens(tokens, actions, 20)


@settings(deadline=None, max_examples=10)
@given(cut=st.integers(1, 11), mark=st.integers(0, 11), seed=st.integers(0, 1000))
@torch.no_grad()
def test_perception_in_pieces_equals_perception_at_once(model, cut, mark, seed):
    """12 frames, a window of 5: the first piece may be longer or shorter than the window, and an episode may begin anywhere."""
    perceiver = model.perceiver_io
    video, _ = make_batch(model, 2, 12, seed)
    is_init = torch.zeros(2, 12, dtype=torch.bool)
    is_init[1, mark] = True
    tokens = perceiver.tokenizer.tokenize(video, is_init).codes
    kept, memory, pieces = perceiver.tokenizer.nothing_kept(2), perceiver.empty_memory(2), []
    for piece in (slice(0, cut), slice(cut, 12)):
        *seen, kept, memory = perceiver.observe(video[:, piece], kept, memory, is_init[:, piece])
        pieces.append(seen)
    assert torch.equal(torch.cat([codes for codes, _ in pieces], 1), tokens)
    context = torch.cat([context for _, context in pieces], 1)
    torch.testing.assert_close(context, perceiver.context(tokens, is_init), rtol=1e-9, atol=1e-10)


def test_predictor_learns_to_copy_and_counts_only_frames_with_a_past():
    model = make_model().train()
    predictor = model.perceiver_io.predictor.float()
    predictor.corruption = 0.0
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
    assert draw(logits, temperature=0).unique().tolist() == [0]
    assert draw(logits, top_p=0.6).unique().tolist() == [0, 1]
    frequency = draw(logits).bincount(minlength=4) / 4000
    torch.testing.assert_close(frequency, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="top_p"):
        draw(logits, top_p=0.0)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), frames=st.integers(1, 6))
def test_lstm_equals_torch_lstm_and_resets(seed, frames):
    torch.manual_seed(seed)
    ours = LSTMLayer(3, 8, num_layers=2).double()
    theirs = nn.LSTM(3, 8, 2, batch_first=True).double()
    with torch.no_grad():
        for i in range(2):
            getattr(theirs, f"weight_ih_l{i}").copy_(ours.input_gates[i].weight)
            getattr(theirs, f"bias_ih_l{i}").copy_(ours.input_gates[i].bias)
            getattr(theirs, f"weight_hh_l{i}").copy_(ours.recurrent[i])
            getattr(theirs, f"bias_hh_l{i}").zero_()
    x = torch.randn(2, frames, 3, dtype=torch.float64)
    going_on = torch.zeros(2, frames, dtype=torch.bool)
    out, states = ours(x, going_on)
    expected, (h, c) = theirs(x)
    torch.testing.assert_close(out, ours.norm(expected))
    torch.testing.assert_close(states[:, -1], torch.stack([h, c], dim=2).transpose(0, 1))
    torch.testing.assert_close(states[:, :, -1, 0], expected)
    reset = going_on.clone()
    reset[:, -1] = True
    torch.testing.assert_close(ours(x, reset)[0][:, -1], ours(x[:, -1:], going_on[:, :1])[0][:, 0])


def test_recurrent_weights_are_orthogonal_and_the_forget_bias_is_one():
    lstm = LSTMLayer(5, 16)
    for gate in lstm.recurrent[0].chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(16), atol=1e-5, rtol=0)
    assert lstm.input_gates[0].bias.view(4, 16).mean(1).tolist() == [0, 1, 0, 0]


@given(x=st.floats(-0.7, 0.7), y=st.floats(-0.7, 0.7))
@settings(deadline=None, max_examples=20)
@torch.no_grad()
def test_a_bump_drawn_at_a_place_is_found_there(x, y):
    grid = 16
    drawing = GaussianHeatmaps(latent_dim=2, count=1, grids=[grid], channels=[1]).double()
    drawing.place.weight.copy_(torch.eye(2))
    drawing.place.bias.zero_()
    drawing.height.weight.zero_()
    drawing.to_features[0].weight.fill_(1.0)
    (map_,) = drawing(torch.tensor([[x, y]], dtype=torch.float64))
    assert map_.shape == (1, 1, grid, grid)
    find = SpatialSoftmax(1, grid).double()
    find.sharpness.fill_(1.0)
    found = find(map_.log())  # the softmax of the logarithm is the bump itself, normalised
    torch.testing.assert_close(found, torch.tensor([[x, y]], dtype=torch.float64), atol=0.03, rtol=0)  # a quarter of a cell


def test_means_are_bounded_and_near_zero_as_they_came():
    raw = torch.tensor([0.1, 100.0, -100.0], dtype=torch.float64)
    torch.testing.assert_close(bounded_mean(raw), torch.tensor([0.1, MEAN_BOUND, -MEAN_BOUND], dtype=torch.float64), rtol=2e-4, atol=0)


def test_gaussian_likelihood_is_the_normal_density():
    x, mean = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = -torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(0.3).nll(mean, x), expected)


def test_mixture_of_logistics_is_a_distribution_over_colours():
    """Summed over all colours it is 1; narrow components in the middle let half the levels of each channel suffice."""
    torch.manual_seed(0)
    likelihood = MixtureOfLogistics(2)
    parameters = torch.randn(1, 20, 1, 1)
    parameters[:, 2:8] *= 0.05  # means
    parameters[:, 14:] *= 0.1  # coefficients
    parameters[:, 8:14] = -3.0  # log-scales: 6 levels wide
    levels = torch.linspace(-1, 1, 256)[64:192]
    colours = torch.cartesian_prod(levels, levels, levels)[..., None, None]  # [128^3, 3, 1, 1]
    total = sum((-likelihood.nll(parameters.expand(len(c), -1, -1, -1), c)).exp().sum().item() for c in colours.split(2**18))
    assert total == pytest.approx(1.0, abs=2e-3)


def test_mixture_log_prob_is_torch_distributions():
    torch.manual_seed(0)
    z, weights = torch.randn(5, 3), torch.randn(5, 4).log_softmax(-1)
    means, logvars = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    d = torch.distributions
    normal = d.Independent(d.Normal(means, (0.5 * logvars).exp()), 1)
    torch.testing.assert_close(
        mixture_log_prob(z, weights, means, logvars), d.MixtureSameFamily(d.Categorical(logits=weights), normal).log_prob(z)
    )
    torch.testing.assert_close(
        gaussian_log_prob(z, means[:, 0], logvars[:, 0]), d.Independent(d.Normal(means[:, 0], (0.5 * logvars[:, 0]).exp()), 1).log_prob(z)
    )


def test_attention_kl_and_diversity_have_the_right_ends():
    torch.manual_seed(0)
    a, b = (torch.rand(3, 16).softmax(1).view(3, 4, 4) for _ in range(2))
    torch.testing.assert_close(attention_kl(a, a.log()), torch.zeros(3), atol=1e-6, rtol=0)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(a.flatten(1)), categorical(b.flatten(1)))
    torch.testing.assert_close(attention_kl(a, b.log()), expected)
    corners = torch.zeros(1, 3, 4, 4)
    corners[0, 0, 0, 0] = corners[0, 1, 0, 3] = corners[0, 2, 3, 3] = 1
    alike = torch.full((1, 3, 4, 4), 1 / 16)
    for measure in (slot_overlap, map_entropy):
        assert measure(corners) == pytest.approx(0, abs=1e-5)
        assert measure(alike) == pytest.approx(1, abs=1e-5)


def test_grids_halve_rounding_up_and_the_mask_keeps_episodes_apart():
    assert halvings(84, 4) == [84, 42, 21, 11, 6]
    is_init = torch.tensor([[False, False, True, False]])
    mask = episode_mask(starts(is_init, 1, 4, is_init.device), window=2)[0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert math.isclose(mask.sum().item(), 6)


@pytest.mark.parametrize("actions", [1, 6])
def test_actions_start_with_half_the_vote(actions):
    layer = nn.Linear(150, 400)
    emphasise_last(layer, actions)
    weight = layer.weight.detach()
    ours, others = weight[:, -actions:].norm(), weight[:, :-actions].norm()
    assert ours / others == pytest.approx(1, abs=0.15)


def test_the_prior_goes_on_as_the_latent_moved():
    torch.manual_seed(0)
    prior = DPGMMPrior(hidden_dim=8, context_dim=6, latent_dim=3, max_components=4).double()
    hidden, context, latents, moved = (torch.randn(5, n, dtype=torch.float64) for n in (8, 6, 3, 3))
    still = prior(hidden, context, latents, torch.zeros_like(moved), sample=False)
    going = prior(hidden, context, latents, moved, sample=False)
    torch.testing.assert_close(going.means - still.means, 0.5 * moved[:, None].expand(-1, 4, -1))  # the gates start half open
    shifted = prior(hidden, context, latents + 1.0, moved, sample=False)
    torch.testing.assert_close(shifted.means, going.means + 1.0)
    assert (still.means - latents[:, None]).std(1).min() > 0.05  # components start apart
