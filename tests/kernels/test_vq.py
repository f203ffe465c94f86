"""Vector quantisation against brute force, and the codebook's moving averages against a plain loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.vq import candidate_rows, code_histogram, codebook_update, codebook_usage, initialise_codebook, reference, vector_quantize

DECAY = 0.99
shapes = st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.integers(1, 17), st.booleans(), st.integers(0, 2**31))


def make(rows, heads, width, size, shared, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, heads, width, generator=generator, dtype=torch.float64)
    return x, torch.randn(1 if shared else heads, size, width, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from([torch.float32, torch.float64]), st.integers(1, 64))
def test_nearest_code(shape, dtype, block):
    x, codebook = make(*shape)
    limit, reference.BLOCK_SCORES_CPU = reference.BLOCK_SCORES_CPU, block  # whatever the size of a block
    try:
        quantized, codes, commitment = vector_quantize(x.to(dtype), codebook.to(dtype))
    finally:
        reference.BLOCK_SCORES_CPU = limit
    every = codebook.expand(shape[1], -1, -1)
    distance = torch.cdist(x.transpose(0, 1), every)  # [Q, N, V]
    chosen = distance.gather(2, codes.t().unsqueeze(2)).squeeze(2)
    assert (chosen <= distance.amin(2) + (1e-9 if dtype == torch.float64 else 1e-4)).all()
    assert quantized.dtype == dtype
    picked = torch.stack([every[q][codes[:, q]] for q in range(shape[1])], 1).to(dtype)
    assert torch.equal(quantized, picked)
    torch.testing.assert_close(commitment, (x.to(dtype) - picked).square().mean())


def test_ties_go_to_the_lowest_index():
    codebook = torch.randn(2, 1, 4).repeat(1, 300, 1)
    assert (vector_quantize(torch.randn(50, 2, 4), codebook)[1] == 0).all()


def test_gradient_is_straight_through_and_commitment_pulls_x_only():
    x, codebook = make(20, 3, 5, 7, False, 0)
    x.requires_grad_()
    codebook.requires_grad_()
    quantized, _, commitment = vector_quantize(x, codebook)
    upstream = torch.randn_like(x)
    passed = torch.autograd.grad(quantized, (x, codebook), upstream, retain_graph=True, allow_unused=True)
    assert torch.equal(passed[0], upstream)
    assert passed[1] is None
    pulled = torch.autograd.grad(commitment, (x, codebook), allow_unused=True)
    torch.testing.assert_close(pulled[0], 2 * (x - quantized).detach() / x.numel())
    assert pulled[1] is None


@settings(deadline=None, max_examples=30)
@given(shapes, st.floats(0, 4))
def test_codebook_update_against_a_loop(shape, threshold):
    x, codebook = make(*shape)
    _, heads, width, size, shared, _ = shape
    groups = 1 if shared else heads
    codes = vector_quantize(x, codebook)[1]
    cluster_size = torch.rand(groups, size, dtype=torch.float64) * 5
    embedding_sum = torch.randn(groups, size, width, dtype=torch.float64)
    u = torch.rand(groups, size)
    decay, eps = 0.9, 1e-5
    *got, counts = codebook_update(x, codes, codebook, cluster_size, embedding_sum, u, decay, eps, threshold)
    assert torch.equal(counts, code_histogram(codes, size, shared))

    for g in range(groups):
        pool = x.reshape(-1, width) if shared else x[:, g]
        pool_codes = codes.reshape(-1) if shared else codes[:, g]
        sizes = [decay * cluster_size[g, v] + (1 - decay) * (pool_codes == v).sum() for v in range(size)]
        total = sum(sizes)
        for v in range(size):
            average = decay * embedding_sum[g, v] + (1 - decay) * pool[pool_codes == v].sum(0)
            expected = (average / ((sizes[v] + eps) / (total + size * eps) * total), sizes[v], average)
            if sizes[v] < threshold:
                sample = pool[int(u[g, v] * len(pool))]
                expected = (sample, torch.tensor(threshold).double(), sample * threshold)
            for ours, theirs in zip(got, expected):
                torch.testing.assert_close(ours[g, v], theirs)


def test_gpu_sums_equal_cpu_sums():
    x, codebook = make(50, 2, 6, 9, False, 3)
    codes = vector_quantize(x, codebook)[1]
    for groups, c in ((2, codes), (1, codes)):
        label = c.t() if groups == 2 else c.reshape(1, -1)
        rows = x.transpose(0, 1) if groups == 2 else x.reshape(1, -1, 6)
        expected = torch.nn.functional.one_hot(label, 9).double().mT @ rows
        torch.testing.assert_close(reference.code_sums(x, c, groups, 9), expected)
        torch.testing.assert_close(reference.one_hot_sums(x, c, groups, 9), expected)


def test_dead_codes_come_back_to_life():
    x = torch.randn(400, 1, 2) * 0.1 + torch.tensor([[[3.0, 3.0]], [[-3.0, -3.0]]]).repeat(200, 1, 1)
    codebook = torch.full((1, 8, 2), 50.0) + torch.arange(8).view(1, 8, 1)  # one code takes everything, the others are far away
    state = (codebook, torch.zeros(1, 8), torch.zeros(1, 8, 2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        codes = vector_quantize(x, state[0])[1]
        *state, _ = codebook_update(x, codes, *state, torch.rand(1, 8, generator=generator), DECAY)
    _, codes, commitment = vector_quantize(x, state[0])
    perplexity, share = codebook_usage(code_histogram(codes, 8, False))
    assert share >= 0.75
    assert perplexity > 4
    assert commitment < 0.05


def test_initialisation_happens_once():
    x, codebook = make(30, 2, 3, 5, False, 1)
    state = (codebook, torch.zeros(2, 5).double(), torch.zeros(2, 5, 3).double(), torch.tensor(False))
    first = initialise_codebook(candidate_rows(x, torch.rand(2, 5)), *state)
    for head in range(2):
        assert all((x[:, head] == code).all(1).any() for code in first[0][head])
    torch.testing.assert_close(first[2], first[0] * 2)
    again = initialise_codebook(candidate_rows(x + 1, torch.rand(2, 5)), *first)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_usage():
    perplexity, share = codebook_usage(torch.tensor([[5, 5, 0, 0], [1, 1, 1, 1]]))
    assert perplexity.item() == pytest.approx(3)
    assert share.item() == pytest.approx(0.75)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[5, 4, 3\]"):
        vector_quantize(torch.randn(5, 4, 3), torch.randn(2, 7, 3))


def test_loss_of_half_precision_rows_is_fp32():
    x, codebook = make(200, 2, 6, 40, False, 5)
    quantized, _, commitment = vector_quantize(x.bfloat16(), codebook.float())
    assert (quantized.dtype, commitment.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(commitment.double(), (x.bfloat16().double() - quantized.double()).square().mean(), rtol=1e-5, atol=0)


def test_compiles_whole():
    x, codebook = make(24, 2, 4, 8, False, 0)
    u = torch.rand(2, 8)

    def step(x, codebook, size, total, flag, u):
        codebook, size, total, flag = initialise_codebook(candidate_rows(x, u), codebook, size, total, flag)
        quantized, codes, commitment = vector_quantize(x, codebook)
        return (quantized, commitment, *(update := codebook_update(x, codes, codebook, size, total, u, DECAY)), *codebook_usage(update[3]))

    arguments = (x, codebook, torch.zeros(2, 8).double(), torch.zeros(2, 8, 4).double(), torch.tensor(False), u)
    for compiled, eager in zip(torch.compile(step, fullgraph=True)(*arguments), step(*arguments)):
        torch.testing.assert_close(compiled, eager)
