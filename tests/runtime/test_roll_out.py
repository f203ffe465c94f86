"""A roll-out, eager and compiled, of a function that needs no model."""

from __future__ import annotations

import copy

import pytest
import torch

from aime_fast.runtime.roll_out import RollOut


def decay(module, action, state, gain):
    """A frame small enough to be compiled in a test."""
    state = module(state) * gain + action
    return {"doubled": 2 * state}, state


@torch.no_grad()
def test_compiled_roll_out_equals_the_plain_one_and_a_copy_is_its_own():
    module, actions, state = torch.nn.Linear(3, 3), torch.rand(2, 5, 3), torch.rand(2, 3)
    plain, last = RollOut(decay)(module, actions, state, 0.5)
    compiled = RollOut(decay, "on")
    copied = copy.deepcopy(compiled)
    assert (copied.mode, copied.frame) == ("on", decay)
    assert copied._advance is not compiled._advance
    for roll_out in (compiled, copied):
        outputs, end = roll_out(module, actions, state, 0.5)
        torch.testing.assert_close(outputs["doubled"], plain["doubled"])
        torch.testing.assert_close(end, last)
    assert plain["doubled"].shape == (2, 5, 3)


def test_wrong_modes_are_named():
    with pytest.raises(ValueError, match="roll-out mode is 'fast', expected one of off, capture, on, graph, whole"):
        RollOut(decay, "fast")
    with pytest.raises(ValueError, match="'graph' needs a CUDA device, the actions are on cpu; use 'on'"):
        RollOut(decay, "graph")(torch.nn.Linear(3, 3), torch.rand(2, 5, 3), torch.rand(2, 3), 0.5)
    with pytest.raises(ValueError, match="no actions"):
        RollOut(decay)(torch.nn.Linear(3, 3), torch.rand(2, 0, 3), torch.rand(2, 3), 0.5)
