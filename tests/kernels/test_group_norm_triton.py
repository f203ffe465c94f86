"""The kernels of GroupNorm and SiLU against the float64 reference, on a GPU or in Triton's interpreter."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels import backend
from kernels.group_norm import group_norm_silu, group_norm_silu_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "to x", "to weight", "to bias")

pytestmark = [
    pytest.mark.usefixtures("triton_kernels"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # of the interpreter; the quotient is 0
]


def problem(seed, shape, offset=0.0, dtype=torch.float32, channels_last=True):
    """[x, weight, bias, grad]."""
    g = torch.Generator().manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    weight, bias = 1 + 0.5 * torch.randn(shape[1], generator=g), torch.randn(shape[1], generator=g)
    return [t.to(DEVICE) for t in ((x + offset).contiguous(memory_format=layout), weight, bias, grad)]


def run(function, inputs, groups):
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    y = function(*leaves, groups)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs[3])]


def errors(function, inputs, groups):
    """What it comes to, how far that is from the float64 reference at most, and the reference."""
    found, exact = run(function, inputs, groups), run(group_norm_silu_reference, [t.double() for t in inputs], groups)
    return found, torch.stack([(x.double() - y).abs().max() for x, y in zip(found, exact)]), exact


def check(inputs, groups, others=()):
    """The kernel's error is at most twice that of the eager reference, plus rounding.

    `others`: problems of the same kind, so that one in which the reference is right by luck sets no budget.
    """
    kernel, ours, exact = errors(group_norm_silu, inputs, groups)
    eager = [errors(group_norm_silu_reference, each, groups) for each in (inputs, *others)]
    theirs = torch.stack([error for _, error, _ in eager]).amax(0)
    for i, name in enumerate(NAMES):
        assert kernel[i].dtype == eager[0][0][i].dtype, name
        assert ours[i] <= 2 * theirs[i] + 4 * torch.finfo(inputs[0].dtype).eps * exact[i].abs().max(), name
    for x in kernel[:2]:
        assert x.is_contiguous(memory_format=torch.channels_last)
    return kernel


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(1140, (5, 5), 3, (6, 9), 30.0, torch.float32, False)  # the reference is right by luck
@given(
    st.integers(0, 2**31),
    st.sampled_from([(48, 8), (96, 8), (32, 8), (7, 1), (130, 1), (5, 5), (256, 8)]),
    st.integers(1, 3),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([0.0, 30.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_forward_and_backward_within_the_budget(seed, channels, frames, grid, offset, dtype, channels_last):
    first, *others = (problem(seed + i, (frames, channels[0], *grid), offset, dtype, channels_last) for i in range(5))
    check(first, channels[1], others)


@pytest.mark.parametrize("architecture", backend.ARCHITECTURES)
def test_each_committed_configuration_on_several_tiles(architecture):
    with backend.pin_architecture(architecture):
        inputs = problem(5, (2, 48, 21, 21), offset=30.0)
        first, again = check(inputs, 8), check(inputs, 8)
    assert all(torch.equal(x, y) for x, y in zip(first, again))  # the same bits every time


def test_a_nan_stays_in_its_group():
    x, weight, bias, _ = problem(1, (2, 48, 5, 7))
    x[1, 7, 2, 3] = float("nan")  # channel 7 is in the second group of 6
    wrong = group_norm_silu(x, weight, bias, 8).isnan()
    assert wrong[1, 6:12].all()
    assert wrong.sum() == 6 * 35


def test_float64_and_no_frames_run_the_reference():
    x, weight, bias, _ = (t.double() for t in problem(2, (2, 48, 3, 3)))
    assert torch.equal(group_norm_silu(x, weight, bias, 8), group_norm_silu_reference(x, weight, bias, 8))
    assert group_norm_silu(x[:0].float(), weight.float(), bias.float(), 8).shape == (0, 48, 3, 3)


def test_autocast_keeps_bfloat16():
    x, weight, bias, _ = problem(3, (2, 48, 4, 4), dtype=torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert group_norm_silu(x, weight, bias, 8).dtype == torch.bfloat16


def test_operators_are_sound():
    torch.use_deterministic_algorithms(False)  # opcheck compares memory that it does not write itself
    for dtype in (torch.float32, torch.float64):
        x, weight, bias, grad = problem(6, (2, 8, 3, 5))
        arguments = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(torch.ops.aime_fast.group_norm_silu, (*arguments, 2, 1e-5))
        plain = [t.detach() for t in arguments]
        _, mean, rstd = torch.ops.aime_fast.group_norm_silu(*plain, 2, 1e-5)
        torch.library.opcheck(torch.ops.aime_fast.group_norm_silu_backward, (grad.to(dtype), *plain, mean, rstd, 2))


def test_compiles_whole():
    x, weight, bias, _ = problem(7, (2, 48, 5, 7))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def loss(x, weight, bias):
        return group_norm_silu(2 * x, weight, bias, 8).square().sum()

    expected, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), torch.autograd.grad(expected, leaves))
