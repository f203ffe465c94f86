"""The frame of reference: where something is, and what it looks like from there."""

from __future__ import annotations

import pytest
import torch
from models import make_model

from aime_fast.encoder_decoder.reference import CELLS, moved, outline, place

SIZE = 32


def blob(column: float, row: float, size: int = SIZE) -> torch.Tensor:
    """A bump of width 2 around a place in pixels: [1, 3, size, size], float64."""
    y, x = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float64)], indexing="ij")
    return torch.exp(-((x - column) ** 2 + (y - row) ** 2) / 8).expand(1, 3, -1, -1)


@pytest.mark.parametrize(("column", "row"), [(15.5, 15.5), (10, 20), (22, 12.3)])
def test_the_place_is_that_of_what_differs(column, row):
    found = place(10 * blob(column, row))[0]  # strong, so that what counts as nothing is small beside it
    expected = torch.tensor([column, row], dtype=torch.float64) / (SIZE / 2) - (SIZE - 1) / SIZE
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_nothing_is_in_the_middle():
    assert place(torch.zeros(2, 3, SIZE, SIZE)).tolist() == [[0.0, 0.0]] * 2


def test_moving_by_whole_pixels_shifts_and_by_none_changes_nothing():
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    assert torch.equal(moved(pictures, torch.zeros(2, 2, dtype=torch.float64)), pictures)
    offset = torch.tensor([[3, -5], [-1, 0]], dtype=torch.float64) * (2 / SIZE)  # right and up; left
    zeros, edges = moved(pictures, offset), moved(pictures, offset, repeat_edge=True)
    torch.testing.assert_close(zeros[0, :, :-5, 3:], pictures[0, :, 5:, :-3])
    assert zeros[0, :, :, :3].abs().max() == 0
    assert zeros[0, :, -5:].abs().max() == 0
    torch.testing.assert_close(edges[0, :, :-5, 0], pictures[0, :, 5:, 0])
    torch.testing.assert_close(edges[1, :, :, -1], pictures[1, :, :, -1])


def test_gradients_are_those_of_the_picture_and_of_the_offset():
    torch.manual_seed(0)
    pictures = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([[0.13, -0.41], [0.27, 0.05]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, o: moved(p, o, repeat_edge=True), (pictures, offset))


def test_an_outline_moves_with_its_place_and_changes_smoothly():
    centre = torch.zeros(1, 2, dtype=torch.float64)
    there = torch.tensor([[4.0, -2.0]], dtype=torch.float64) * (2 / SIZE)
    still = outline(blob(15, 15), centre)
    assert still.shape == (1, 3, CELLS, CELLS)
    torch.testing.assert_close(outline(blob(19, 13), there), still, atol=1e-6, rtol=0)
    half, whole = ((outline(blob(15 + d, 15), centre) - still).norm() for d in (0.5, 1.0))
    assert 0.4 < half / whole < 0.6


@torch.no_grad()
def test_what_moves_is_the_same_to_all_latents_but_the_first_two():
    """Of a fresh encoder, but for the dense layer, which is told the place too."""
    encoder = make_model().encoder
    encoder.dense[0].weight[:, -2:] = 0.0
    encoder.mean.weight[2:, encoder.dense[0].out_features + 3 * CELLS**2 :] = 0.0  # place and context
    context = torch.zeros(1, encoder.logvar.in_features - encoder.dense[0].out_features, dtype=torch.float64)
    one, other = (encoder(encoder.background + 10 * blob(*at), context).mean[0] for at in ((13, 14), (17, 18)))
    torch.testing.assert_close(one[2:], other[2:], atol=1e-3, rtol=0)
    assert (one[:2] - other[:2]).abs().min() > 0.05


@torch.no_grad()
def test_the_decoder_puts_its_picture_where_the_latent_says():
    decoder = make_model().decoder
    decoder.background.zero_()
    decoder.place.weight.zero_()
    decoder.place.weight[0, 0] = 1.0
    decoder.unpool[0].weight[:, 0] = 0.0  # what is drawn does not depend on where
    latents = torch.randn(1, decoder.place.in_features, dtype=torch.float64)
    uniform = torch.full((1, 4, 4), 1 / 16, dtype=torch.float64)
    size = decoder.background.shape[-1]
    latents[:, 0] = 0.0
    here = decoder(latents, uniform)
    latents[:, 0] = 4 * 2 / size
    there = decoder(latents, uniform)
    torch.testing.assert_close(there[..., 4:], here[..., :-4])
