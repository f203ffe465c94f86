"""Losses of the attention schema at their ends."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aime_fast.attention_schema.schema import attention_kl, foreground, map_entropy, slot_overlap
from aime_fast.attention_schema.slot_attention import gru


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


def test_the_motion_loss_trains_the_predicted_movement_alone(model):
    torch.manual_seed(0)
    schema, grid = model.attention, model.attention.grid
    attention, before = (torch.rand(2, 3, grid, grid, dtype=torch.float64).requires_grad_() for _ in range(2))
    movement = torch.rand(2, 3, 2, grid, grid, dtype=torch.float64).requires_grad_()
    loss = schema.motion_loss(attention, before, movement, torch.zeros(2, 3, dtype=torch.bool))
    gradients = torch.autograd.grad(loss, (attention, before, movement), allow_unused=True)
    assert gradients[0] is None
    assert gradients[1] is None
    assert gradients[2].any()


def test_the_foreground_is_where_the_frame_differs_from_the_background():
    background = torch.rand(3, 32, 32, dtype=torch.float64)
    frames = background.expand(2, -1, -1, -1).clone()
    frames[0, :, 8:16, 24:32] += 0.5
    frames[1, :, 0:8, 0:8] += 0.1
    frames[1, :, 16:24, 8:16] -= 0.3
    found = foreground(frames, background, 4)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2, dtype=torch.float64))
    assert found[0, 1, 3] > 0.99
    assert found[1, 2, 1] / found[1, 0, 0] == pytest.approx(9, rel=1e-3)


def test_without_foreground_it_is_everywhere():
    background = torch.rand(3, 32, 32)
    torch.testing.assert_close(foreground(background[None], background, 4), torch.full((1, 4, 4), 1 / 16))


@pytest.mark.cuda
def test_the_fused_gru_of_a_gpu_is_the_written_out_one():
    torch.manual_seed(0)
    written = nn.GRUCell(6, 6).double()
    fused, x, h = copy.deepcopy(written).cuda(), *torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected, found = gru(written, x, h), gru(fused, x.cuda(), h.cuda())
    torch.testing.assert_close(found.cpu(), expected)
    for output in (expected, found):
        output.cos().sum().backward()
    for ours, theirs in zip(fused.parameters(), written.parameters()):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
