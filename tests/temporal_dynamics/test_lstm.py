"""The recurrence against PyTorch's LSTM."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aime_fast.temporal_dynamics import LSTMLayer


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


@pytest.mark.cuda
def test_the_fused_cell_of_a_gpu_is_the_written_out_one():
    written = LSTMLayer(3, 8, num_layers=2).double()
    fused, x = copy.deepcopy(written).cuda(), torch.randn(2, 5, 3, dtype=torch.float64)
    start = torch.tensor([[True, False, False, True, False], [True, False, False, False, False]])
    expected, found = written(x, start), fused(x.cuda(), start.cuda())
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours.cpu(), theirs)
    for outputs in (expected, found):
        sum(output.cos().sum() for output in outputs).backward()
    for ours, theirs in zip(fused.parameters(), written.parameters()):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)
