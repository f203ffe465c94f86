"""The kernels of vector quantisation against the float64 reference: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
from architectures import distinct
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aime_fast.perceiver_io.quantizer import VectorQuantizer
from kernels.backend import pin_architecture, select_kernels
from kernels.vq import codebook_update, codebook_update_reference, vector_quantize, vector_quantize_reference

pytest.importorskip("triton")
from kernels.vq import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float32).eps
DECAY = 0.99
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("triton_kernels")

shapes = st.tuples(
    st.sampled_from([1, 2, 31, 128, 131]),  # N
    st.integers(1, 3),  # Q
    st.sampled_from([1, 5, 12, 16, 64, 65]),  # d
    st.sampled_from([1, 3, 64, 129]),  # V
    st.booleans(),  # shared
    st.integers(0, 2**31),
)
some = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
LARGE, SMALL, WIDE = (131, 2, 5, 129, False, 0), (1, 1, 1, 1, True, 1), (128, 1, 65, 64, True, 2)  # of `shapes`


def make(rows, heads, width, size, shared, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, heads, width, generator=generator).to(DEVICE, dtype)
    return x, torch.randn(1 if shared else heads, size, width, generator=generator).to(DEVICE)


def make_state(x, codebook, seed=0):
    """codes, cluster_size, embedding_sum, candidates_u for an update."""
    generator = torch.Generator().manual_seed(seed)
    groups, size, _ = codebook.shape
    codes = torch.randint(size, x.shape[:2], generator=generator)
    cluster_size = torch.rand(groups, size, generator=generator) * 5
    embedding_sum = torch.randn(codebook.shape, generator=generator)
    return codes.to(DEVICE), cluster_size.to(DEVICE), embedding_sum.to(DEVICE), torch.rand(groups, size, generator=generator).to(DEVICE)


def excess(x, codebook, codes):
    """How much farther the chosen codes are than the nearest, in float64 squared distance, at worst; and the largest distance."""
    every = codebook.double().expand(x.shape[1], -1, -1)
    distance = (x.double().transpose(0, 1).unsqueeze(2) - every.unsqueeze(1)).square().sum(3)  # [Q, N, V]
    chosen = distance.gather(2, codes.t().unsqueeze(2)).squeeze(2)
    return (chosen - distance.amin(2)).max().item(), distance.max().item()


def check_assignment(x, codebook):
    quantized, codes, commitment = vector_quantize(x, codebook)
    _, eager_codes, eager_commitment = vector_quantize_reference(x, codebook)
    ours, largest = excess(x, codebook, codes)
    theirs, _ = excess(x, codebook, eager_codes)
    assert ours <= 2 * theirs + EPS * largest
    book = codebook.expand(x.shape[1], -1, -1)
    assert torch.equal(quantized, torch.stack([book[q][codes[:, q]] for q in range(x.shape[1])], 1).to(x.dtype))
    exact = (x.double() - quantized.double()).square().mean()
    # Where the eager codes are others, so is the loss that they explain.
    error = (eager_commitment - exact).abs() if torch.equal(codes, eager_codes) else 0.0
    assert commitment.dtype == torch.float32
    assert (commitment - exact).abs() <= 2 * error + 4 * EPS * exact


@some
@example(LARGE, torch.float32)
@example(SMALL, torch.float32)
@example(WIDE, torch.bfloat16)
@given(shapes, st.sampled_from(DTYPES))
def test_nearest_code(shape, dtype):
    check_assignment(*make(*shape, dtype))


@pytest.mark.parametrize("arch", distinct(launch.ASSIGN, launch.SUMS, launch.UPDATE, launch.PREPARE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_configuration(arch, dtype):
    x, codebook = make(133, 2, 20, 131, False, arch, dtype)
    with pin_architecture(arch):
        check_assignment(x, codebook)
        check_update(x, codebook)


@pytest.mark.parametrize("width", [128, 136, 256])
def test_wide_codes_are_read_in_pieces(width):
    x, codebook = make(30, 2, width, 40, True, width)
    check_assignment(x, codebook)
    check_update(x, codebook)


def test_scores_have_the_precision_of_fp32():
    """Codes that differ in the last bits of fp32 only: an error as of two parts of bf16, or of tf32, takes the wrong one."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 1, 16, generator=generator)
    codebook = (base + torch.randn(1, 64, 16, generator=generator) * 2e-4).to(DEVICE)
    x = (base + torch.randn(200, 1, 16, generator=generator) * 2e-4).to(DEVICE)
    check_assignment(x, codebook)


@some
@example(LARGE)
@example(SMALL)
@given(shapes)
def test_ties_go_to_the_lowest_index(shape):
    """Scores of small integers are exact, and there are ties within tiles and across them."""
    rows, heads, _, size, shared, seed = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (rows, heads, 2), generator=generator).float().to(DEVICE)
    codebook = torch.randint(-2, 3, (1 if shared else heads, size, 2), generator=generator).float().to(DEVICE)
    distance = (x.transpose(0, 1).unsqueeze(2) - codebook.expand(heads, -1, -1).unsqueeze(1)).square().sum(3)  # [Q, N, V]
    lowest = (distance == distance.amin(2, keepdim=True)).long().argmax(2)
    assert torch.equal(vector_quantize(x, codebook)[1], lowest.t())


def test_rows_that_are_no_numbers_get_some_code():
    x, codebook = make(5, 1, 4, 7, False, 0)
    x[1], x[3, 0, 2] = float("nan"), float("inf")
    codes = vector_quantize(x, codebook)[1]
    assert ((codes >= 0) & (codes < 7)).all()
    good = torch.tensor([0, 2, 4], device=DEVICE)
    assert torch.equal(codes[good], vector_quantize_reference(x, codebook)[1][good])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype):
    x, codebook = make(21, 3, 5, 7, False, 0, dtype)
    x.requires_grad_()
    codebook.requires_grad_()
    upstream = torch.randn(x.shape, device=DEVICE).to(dtype)

    def gradient(run, with_quantized, with_commitment):
        quantized, _, commitment = run(x, codebook)
        loss = with_quantized * (quantized * upstream).sum() if with_quantized else 0.0
        if with_commitment:
            loss = loss + 0.25 * commitment
        grads = torch.autograd.grad(loss, (x, codebook), allow_unused=True)
        assert grads[1] is None
        return grads[0]

    for used in ((1, 0), (0, 1), (1, 1)):  # an output without use hands over None
        ours, theirs = gradient(vector_quantize, *used), gradient(vector_quantize_reference, *used)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)
    expanded = torch.autograd.grad(vector_quantize(x, codebook)[0].sum(), x)[0]  # a gradient of stride 0
    assert torch.equal(expanded, torch.ones_like(x))


def test_gradient_after_the_codebook_moved():
    x, codebook = make(9, 2, 4, 6, True, 1)
    x.requires_grad_()
    quantized, _, commitment = vector_quantize(x, codebook)
    codebook.add_(1)
    (pulled,) = torch.autograd.grad(commitment, x)
    torch.testing.assert_close(pulled, 2 * (x - quantized).detach() / x.numel())


def test_second_derivative_sees_a_constant_code():
    x, codebook = make(4, 1, 3, 5, True, 1)
    x.requires_grad_()
    (first,) = torch.autograd.grad(vector_quantize(x, codebook)[2], x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2 / x.numel()))


def check_update(x, codebook, threshold=2.0):
    codes, *state = make_state(x, codebook)
    settings = (0.9, 1e-5, threshold)
    ours = codebook_update(x, codes, codebook, *state, *settings)
    eager = codebook_update_reference(x, codes, codebook, *state, *settings)
    cluster_size, embedding_sum, u = state
    exact = codebook_update_reference(x, codes, codebook.double(), cluster_size.double(), embedding_sum.double(), u, *settings)
    assert torch.equal(ours[3], exact[3])
    for got, low, right in zip(ours[:3], eager, exact):
        assert got.dtype == torch.float32
        error = (low - right).abs().max()
        assert (got - right).abs().max() <= 2 * error + EPS * right.abs().max()


@some
@example(LARGE, torch.float32, 3.0)
@example(SMALL, torch.float16, 0.0)
@example(WIDE, torch.bfloat16, 0.7)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from([0.0, 0.7, 3.0]))
def test_codebook_update(shape, dtype, threshold):
    check_update(*make(*shape, dtype), threshold)


def test_update_adds_splits():
    check_update(*make(2500, 1, 3, 5, False, 0))
    check_update(*make(700, 2, 3, 130, True, 0, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_lose_no_bit(dtype):
    """One row for each code and no memory: the new sums are the rows, to the last bit, over 12 decades."""
    x, codebook = make(150, 1, 70, 150, False, 2, dtype)
    if dtype == torch.float32:
        x = x * 10.0 ** torch.randint(-6, 7, x.shape, device=DEVICE)
    codes = torch.randperm(150, device=DEVICE).unsqueeze(1)
    zero = torch.zeros(1, 150, device=DEVICE)
    update = codebook_update(x, codes, codebook, zero, codebook, zero, decay=0.0, dead_threshold=0.0)
    assert torch.equal(update[2][0][codes[:, 0]], x[:, 0].float())
    assert torch.equal(update[3], torch.ones_like(update[3]))


def test_number_of_splits_depends_on_sizes_alone():
    for rows in (1, 1023, 1025, 65536, 262144, 10**6):
        for groups in (1, 3, 64):
            split = launch.split_rows(rows, groups)
            assert split % 1024 == 0
            assert -(-rows // split) * groups <= max(32, groups)


def test_repeatable_to_the_bit():
    x, codebook = make(1100, 1, 7, 30, True, 0)

    def run():
        quantized, codes, commitment = vector_quantize(x, codebook)
        return quantized, codes, commitment, *codebook_update(x, codes, codebook, *make_state(x, codebook)[1:], DECAY)

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


def test_inputs_need_not_be_contiguous():
    x, codebook = make(8, 3, 10, 12, False, 0)
    plain = vector_quantize(x, codebook)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    book = codebook.mT.contiguous().mT
    for a, b in zip(plain, vector_quantize(strided, book)):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    codes, *state = make_state(x, codebook)
    scattered = [t.t().contiguous().t() if t.ndim == 2 else t.mT.contiguous().mT for t in state]
    moved = codebook_update(strided, codes.t().contiguous().t(), book, *scattered, DECAY)
    for a, b in zip(codebook_update(x, codes, codebook, *state, DECAY), moved):
        assert torch.equal(a, b)


def test_float64_and_empty_batches_run_the_reference():
    x, codebook = make(6, 2, 4, 5, True, 0)
    for a, b in zip(vector_quantize(x.double(), codebook.double()), vector_quantize_reference(x.double(), codebook.double())):
        assert torch.equal(a, b)
        assert a.dtype in (torch.float64, torch.int64)
    quantized, codes, commitment = vector_quantize(x[:0], codebook)
    assert quantized.shape == (0, 2, 4)
    assert codes.shape == (0, 2)
    assert commitment.isnan()


@pytest.mark.parametrize("choice", ["triton", "reference"])
@pytest.mark.parametrize("shared", [False, True])
def test_registration(choice, shared):
    select_kernels(choice)  # the fixture restores it
    # Poisoned memory would make opcheck's own comparisons of fresh buffers fail.
    torch.use_deterministic_algorithms(False)
    x, codebook = make(11, 2, 5, 6, shared, 0, torch.bfloat16 if shared else torch.float32)
    torch.library.opcheck(torch.ops.aime_fast.vq_assign, (x.requires_grad_(), codebook))
    codes, *state = make_state(x, codebook)
    torch.library.opcheck(torch.ops.aime_fast.vq_update, (x.detach(), codes, codebook, *state, 0.99, 1e-5, 2.0))


def test_compiles_whole_for_any_number_of_rows():
    def forward(x, codebook, cluster_size, embedding_sum, u):
        quantized, codes, commitment = vector_quantize(x.sin(), codebook)
        return quantized.square().sum() + commitment, *codebook_update(x, codes, codebook, cluster_size, embedding_sum, u, DECAY)

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for rows in (7, 12):
        x, codebook = make(rows, 2, 5, 6, False, rows)
        _, *state = make_state(x, codebook)
        mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, theirs = compiled(mine, codebook, *state), forward(yours, codebook, *state)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)
        ours[0].backward()
        theirs[0].backward()
        torch.testing.assert_close(mine.grad, yours.grad)


@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_several_gradients_inside_one_graph():
    """As in the training step: gradients of two losses are taken inside the compiled function."""

    def step(x, codebook):
        quantized, _, commitment = vector_quantize(x.sin(), codebook)
        (first,) = torch.autograd.grad(quantized.cos().sum(), x, retain_graph=True)
        (second,) = torch.autograd.grad(commitment, x)
        return first, second

    x, codebook = make(9, 2, 5, 6, True, 0)
    x.requires_grad_()
    for a, b in zip(torch.compile(step, fullgraph=True)(x, codebook), step(x, codebook)):
        torch.testing.assert_close(a, b)


def test_compiled_graph_holds_the_operations():
    """The kernels run inside compiled code, and not their references."""
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, codebook = make(6, 2, 4, 5, True, 0)
    codes, *state = make_state(x, codebook)
    torch.compile(lambda x: vector_quantize(x, codebook), fullgraph=True, backend=backend)(x)
    torch.compile(lambda x: codebook_update(x, codes, codebook, *state, DECAY), fullgraph=True, backend=backend)(x)
    assert any("vq_assign" in name for name in seen)
    assert any("vq_update" in name for name in seen)


def test_quantizer_learns_the_same():
    results = []
    for choice in ("triton", "reference"):
        select_kernels(choice)
        torch.manual_seed(0)
        quantizer = VectorQuantizer(heads=2, codebook_size=9, code_dim=4, decay=0.8).to(DEVICE)
        for _ in range(3):
            x = torch.randn(40, 2, 4, device=DEVICE)
            quantizer.initialise(x, 1)
            got = quantizer(x)
            quantizer.learn(x, got.codes, 1)
        results.append((*got, *quantizer.state_dict().values()))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)
