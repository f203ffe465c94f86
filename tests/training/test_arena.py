"""Flat parameters, and Adam on them, against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aime_fast.training.adam import Adam
from aime_fast.training.arena import Arena, GradientRows


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 4), channels=st.integers(1, 5), seed=st.integers(0, 100), beta1=st.sampled_from([0.0, 0.5, 0.9]))
def test_an_update_of_the_arena_is_that_of_torch(size, channels, seed, beta1):
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Conv2d(channels, 3, size), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 1))
    ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    layouts = [p.stride() for p in ours.parameters()]
    arena = Arena(ours.parameters())
    assert [p.stride() for p in ours.parameters()] == layouts
    slow = list(ours[2].parameters())
    scale = arena.flatten([torch.full_like(p, 1.5 if any(p is s for s in slow) else 1.0) for p in arena.parameters])
    optimizer = Adam(arena.flat, beta1, scale=scale)
    theirs = torch.optim.Adam(
        [{"params": [*plain[0].parameters(), *plain[1].parameters()]}, {"params": plain[2].parameters(), "lr": 1.5e-2}],
        lr=1e-2, betas=(beta1, 0.999),
    )  # fmt: skip
    for _ in range(3):
        x = torch.randn(2, channels, 5, 5)
        gradients = torch.autograd.grad(ours(x).square().sum(), arena.parameters)
        for made in (False, True):  # one that is not made changes nothing
            gradient = arena.flatten(gradients) + (0 if made else torch.nan)
            optimizer.update(gradient, torch.tensor(1e-2), torch.tensor(made))
        theirs.zero_grad()
        plain(x).square().sum().backward()
        theirs.step()
    for mine, expected in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)
    assert optimizer.updates == 3
    arena.flat[:] = 0
    assert not any(p.any() for p in ours.parameters())


def test_flatten_is_the_inverse_of_split_and_padding_is_zero():
    parameters = [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last))]
    arena = Arena(parameters)
    assert torch.equal(arena.flatten([p.detach() for p in parameters]), arena.flat)
    assert torch.equal(arena.flatten([p.detach().contiguous() for p in parameters]), arena.flat)
    assert all(view.data_ptr() % 128 == arena.flat.data_ptr() % 128 for view in arena.split(arena.flat))
    assert not arena.flatten([None, None]).any()
    ones = arena.flatten([torch.ones_like(p) for p in parameters])
    assert ones.sum() == 15 + 72


def test_a_row_is_complete_with_the_part_that_its_loss_reaches():
    """From the first such parameter to the last, a view; what lies outside is zero. Not for a loss that reaches nothing."""
    parameters = [nn.Parameter(torch.randn(size)) for size in (3, 40, 5, 7)]  # take 32, 64, 32, 32 elements
    rows, parts = GradientRows(Arena(parameters), 3), []
    a, b, c, d = parameters
    losses = {"ends": a.sum() * d.sum(), "none": torch.zeros(()), "inner": b.square().sum() + c.sum()}
    found = rows.gather(losses, complete=parts.append)
    assert [(part.data_ptr() - found.data_ptr()) // 4 for part in parts] == [0, 2 * 160 + 32]
    assert [len(part) for part in parts] == [160, 96]
    assert torch.equal(found[2].nonzero().squeeze(1), torch.cat([torch.arange(32, 72), torch.arange(96, 101)]))
    assert not found[1].any()


def test_a_parameter_with_gaps_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 2\) and strides \(4, 1\) is not dense"):
        Arena([nn.Parameter(torch.zeros(3, 4))[:, :2]])
