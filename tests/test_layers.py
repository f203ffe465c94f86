"""Shared layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from aime_fast.layers import emphasise_last, episode_mask, halvings, starts


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
