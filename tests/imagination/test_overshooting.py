"""The model's own roll-out, scored: against one-step terms, across cuts, and what it teaches."""

from __future__ import annotations

import pytest
import torch
from models import make_batch, make_model

from aime_fast.imagination.overshooting import BURN_IN, pixel_overshooting
from aime_fast.layers import starts
from aime_fast.multi_task_learning.loss_aggregator import OVERSHOOT
from aime_fast.multi_task_learning.losses import mixture_log_prob


def infer(model, video, actions, is_init=None):
    start = starts(is_init, *video.shape[:2], video.device)
    return model._infer(video, model._perceive(video, start)[1], actions, start), start


@torch.no_grad()
def test_the_first_frame_is_the_one_step_prior(model):
    video, actions = make_batch(model, 2, 2)
    inferred, start = infer(model, video, actions)
    found = pixel_overshooting(model, inferred, video, actions, start, 1)
    p, z = inferred.prior, inferred.latents.unflatten(0, (2, 2))[:, 1]
    rows = [1, 3]  # frame 1 of both sequences
    spread = model.prior.spread(p.features[rows]).unsqueeze(1)
    expected = -mixture_log_prob(z, p.log_weights[rows], p.means[rows], spread).mean()
    torch.testing.assert_close(found["overshoot_latent"], expected)
    decoded = model.predict_future(video[:, :1], actions[:, :1], actions[:, 1:])["reconstructions"][:, 0]
    torch.testing.assert_close(found["overshoot_recon"], model.decoder.likelihood.nll(decoded, video[:, 1]).mean())


@torch.no_grad()
def test_frames_after_a_cut_do_not_count(model):
    video, actions = make_batch(model, 1, 4)
    cut = torch.tensor([[False, False, True, False]])
    inferred, start = infer(model, video, actions, cut)
    found = pixel_overshooting(model, inferred, video, actions, start, 3)
    other = video.clone()
    other[:, 2:] += 0.5
    assert pixel_overshooting(model, inferred, other, actions, start, 3)["overshoot_recon"] == found["overshoot_recon"]
    other[:, 1] += 0.5
    assert pixel_overshooting(model, inferred, other, actions, start, 3)["overshoot_recon"] != found["overshoot_recon"]


def test_it_teaches_every_predictor_and_targets_get_no_gradient():
    model = make_model().train()
    video, actions = make_batch(model, 2, 5)
    inferred, start = infer(model, video, actions)
    loss = sum(
        pixel_overshooting(model, inferred, video, actions, start, 4)[name] for name in OVERSHOOT
    )  # from frame 0, all others are targets
    names = dict(model.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values()), allow_unused=True, retain_graph=True)))
    taught = {name.partition(".")[0] for name, g in gradients.items() if g is not None and g.any()}
    assert {"prior", "recurrence", "attention", "decoder"} <= taught
    # The latent is where it is: neither as a start nor as a target is it bent to what is easy to predict, but by what the recurrence reads.
    without_recurrence = inferred._replace(hidden=inferred.hidden.detach(), lstm=inferred.lstm.detach())
    rolled = sum(pixel_overshooting(model, without_recurrence, video, actions, start, 4)[name] for name in OVERSHOOT)
    encoder = torch.autograd.grad(rolled, list(model.encoder.parameters()), allow_unused=True, retain_graph=True)
    assert all(g is None or not g.any() for g in encoder)
    maps = torch.autograd.grad(loss, inferred.maps.attention)[0].unflatten(0, start.shape)
    assert maps[:, 0].any()
    assert not maps[:, 1:].any()


def test_the_first_context_gets_no_gradient_but_through_the_recurrence():
    model = make_model().train()
    video, actions = make_batch(model, 2, 5)
    inferred, start = infer(model, video, actions)
    without_recurrence = inferred._replace(hidden=inferred.hidden.detach(), lstm=inferred.lstm.detach())
    loss = sum(pixel_overshooting(model, without_recurrence, video, actions, start, 4).values())
    assert torch.autograd.grad(loss, inferred.context, allow_unused=True) == (None,)


@pytest.mark.parametrize("frames", [1, 5])
def test_own_tokens_are_those_of_the_frame_before(model, frames):
    predictor = model.perceiver_io.predictor
    video, actions = make_batch(model, 2, frames + 1)
    tokens, _, _ = model.perceiver_io.tokenizer.encode(video)
    start = starts(None, 2, frames + 1, video.device)
    context = model.perceiver_io.context(tokens, start)
    given = tokens[:, :-1]
    assert torch.equal(predictor._mix_in_own(given, context, actions, start, 0.0), given)
    mixed = predictor._mix_in_own(given, context, actions, start, 1.0)
    assert torch.equal(mixed[:, 0], given[:, 0])
    for t in range(1, frames):
        assert torch.equal(mixed[:, t], predictor.sample(tokens[:, t - 1], context[:, t - 1], actions[:, t - 1], temperature=0))


def test_a_roll_out_begins_after_the_first_frames(model):
    """The attention map of the frame it begins at is the only one with gradient."""
    video, actions = make_batch(model, 2, 8)
    inferred, start = infer(model, video, actions)
    begun = set()
    for seed in range(12):
        torch.manual_seed(seed)
        loss = sum(pixel_overshooting(model, inferred, video, actions, start, 3).values())
        (gradient,) = torch.autograd.grad(loss, inferred.maps.attention, retain_graph=True)
        begun |= set(gradient.unflatten(0, start.shape).flatten(2).any(2).any(0).nonzero().flatten().tolist())
    assert begun == {BURN_IN - 1, BURN_IN, BURN_IN + 1}  # and the last one leaves three frames
