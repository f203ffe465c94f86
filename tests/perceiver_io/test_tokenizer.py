"""The tokenizer: causal convolutions, and what decoding needs."""

from __future__ import annotations

import pytest
import torch
from models import make_batch
from torch import nn

from aime_fast.layers import starts
from aime_fast.perceiver_io.tokenizer import CausalConv3d


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
    start = starts(None, 1, 6, video.device)
    quantized = tokenizer.tokenize(video, start).quantized
    torch.testing.assert_close(tokenizer.decode(tokens), tokenizer.decode_vectors(quantized, start))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 32
    a, b = tokenizer.decode(tokens), tokenizer.decode(changed)
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert (a[:, 3] - b[:, 3]).abs().max() > 1e-6
