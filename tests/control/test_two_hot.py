from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.modules.models.model_based import two_hot_encode

from aime_fast.control.two_hot import BINS, LIMIT, TwoHot, symexp, symlog

REWARDS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(REWARDS)
def test_symexp_inverts_symlog(values):
    x = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x)


@given(REWARDS)
def test_the_loss_is_that_of_torchrls_two_hot_target_in_symlog(values):
    two_hot, target = TwoHot().double(), torch.tensor(values, dtype=torch.float64)
    logits = torch.randn(len(values), BINS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    encoded = two_hot_encode(symlog(target), torch.linspace(-LIMIT, LIMIT, BINS, dtype=torch.float64))
    expected = -(encoded * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(two_hot.nll(logits, target), expected, atol=1e-6, rtol=1e-6)


@given(REWARDS)
def test_the_best_logits_decode_to_the_target(values):
    two_hot, target = TwoHot().double(), torch.tensor(values, dtype=torch.float64)
    encoded = two_hot_encode(symlog(target), torch.linspace(-LIMIT, LIMIT, BINS, dtype=torch.float64))
    torch.testing.assert_close(two_hot.decode((encoded + 1e-30).log()), target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("target", [-1e12, 1e12])
def test_numbers_beyond_the_last_bin_count_as_the_last(target):
    two_hot = TwoHot()
    logits = torch.zeros(1, BINS)
    logits[0, 0 if target < 0 else -1] = 50.0
    assert two_hot.nll(logits, torch.tensor([target])).item() < 1e-4


def test_a_target_gets_no_gradient():
    target = torch.ones(1, requires_grad=True)
    logits = torch.zeros(1, BINS, requires_grad=True)
    TwoHot().nll(logits, target).sum().backward()
    assert target.grad is None
    assert logits.grad.abs().sum() > 0
