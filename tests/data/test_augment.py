"""Augmentation: the identity at zero, one transform a sequence, and a known shift."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aime_fast.data import augment, normalise


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_normalise_is_exact_at_the_ends():
    assert normalise(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@settings(deadline=None, max_examples=30)
@given(shift=st.floats(0, 0.3), zoom=st.floats(0, 0.3), seed=st.integers(0, 99), size=st.integers(2, 17), frames=st.integers(1, 4))
def test_frames_of_a_sequence_move_together_and_stay_in_range(shift, zoom, seed, size, frames):
    still = noise(3, 1, 3, size, size, seed=seed).expand(3, frames, 3, size, size)
    out = augment(still, shift, zoom, generator=torch.Generator().manual_seed(seed))
    assert out.shape == still.shape
    assert out.dtype == torch.float32
    assert out.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=0)
    again = augment(still, shift, zoom, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(out, again)


def test_without_shift_and_zoom_it_only_normalises():
    pixels = noise(2, 3, 3, 9, 9)
    assert torch.equal(augment(pixels, 0.0, 0.0), normalise(pixels))
    torch.testing.assert_close(augment(pixels, 1e-9, 0.0), normalise(pixels), rtol=0, atol=1e-4)


def test_sequences_move_differently_and_within_the_largest_shift():
    size, limit = 65, 0.1
    pixels = torch.zeros(64, 1, 3, size, size, dtype=torch.uint8)
    pixels[..., size // 2, size // 2] = 255
    out = (augment(pixels, limit, 0.0, generator=torch.Generator().manual_seed(0))[:, 0, 0] + 1) / 2
    axis = torch.arange(size) - size // 2
    x, y = (out.sum(1) * axis).sum(1), (out.sum(2) * axis).sum(1)
    moved = torch.stack([x, y])
    assert moved.abs().max() <= limit * size + 1e-3
    assert moved.abs().max() > 0.8 * limit * size
    assert moved.std(1).min() > 0.3 * limit * size
