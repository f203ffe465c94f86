"""GroupNorm and SiLU: the reference against its formula, gradients, dtypes, layouts and errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aime_fast.layers import GroupNormSiLU
from kernels.group_norm import group_norm_silu, group_norm_silu_reference

sizes = st.tuples(st.integers(1, 3), st.sampled_from([(4, 1), (6, 2), (48, 8), (5, 5), (12, 4)]), st.integers(1, 5), st.integers(1, 5))


def problem(seed, size, dtype=torch.float64):
    frames, (channels, groups), height, width = size
    g = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(frames, channels, height, width, generator=g, dtype=dtype)
    weight, bias = torch.randn(2, channels, generator=g, dtype=dtype)
    return x, weight, bias, groups


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), sizes)
def test_reference_is_the_formula(seed, size):
    x, weight, bias, groups = problem(seed, size)
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    normal = (centred * (centred.square().mean(2, keepdim=True) + 1e-5).rsqrt()).reshape(x.shape)
    u = normal * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(group_norm_silu(x, weight, bias, groups), u * u.sigmoid())


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([(2, (6, 2), 2, 3), (1, (5, 5), 3, 2), (2, (4, 1), 1, 2)]))
def test_gradients_against_finite_differences(seed, size):
    x, weight, bias, groups = problem(seed, size)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: group_norm_silu(*t, groups), leaves)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operation_has_the_reference_behind_it(layout):
    x, weight, bias, groups = problem(0, (2, (6, 2), 2, 3))
    leaves = [t.clone().requires_grad_() for t in (x.contiguous(memory_format=layout), weight, bias)]

    def operation(*t):
        return torch.ops.aime_fast.group_norm_silu(*t, groups, 1e-5)[0]

    torch.testing.assert_close(operation(*leaves), group_norm_silu(*leaves, groups))
    assert torch.autograd.gradcheck(operation, leaves)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), sizes, st.booleans())
def test_fp32_on_a_cpu_has_the_bits_of_two_layers(seed, size, channels_last):
    x, weight, bias, groups = problem(seed, size, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    assert torch.equal(group_norm_silu_reference(x, weight, bias, groups), F.silu(torch.group_norm(x, groups, weight, bias, 1e-5)))


def test_autocast_keeps_the_dtype():
    layer = GroupNormSiLU(48)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(2, 48, 5, 5, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), layer(x.float()), rtol=2**-6, atol=2**-6)
        assert torch.autograd.grad(y.float().sum(), x)[0].dtype == dtype


@pytest.mark.parametrize(("channels", "groups"), [(48, 8), (16, 4), (6, 1), (8, 2), (3, 1)])
def test_groups_have_four_channels_or_more(channels, groups):
    assert GroupNormSiLU(channels).num_groups == groups


def test_no_frames_and_a_frame_depends_on_itself_alone():
    x, weight, bias, groups = problem(0, (3, (6, 2), 4, 4))
    assert group_norm_silu(x[:0], weight, bias, groups).shape == (0, 6, 4, 4)
    torch.testing.assert_close(group_norm_silu(x, weight, bias, groups)[1:2], group_norm_silu(x[1:2], weight, bias, groups))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 4)}, r"x is torch.float32 \[2, 6, 4\]"),
        ({"x": torch.zeros(2, 6, 4, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"groups": 4}, r"4 groups do not divide the 6 channels"),
        ({"groups": 0}, r"0 groups"),
        ({"weight": torch.ones(5)}, r"weight is torch.float32 \[5\]; expected floats \[6\]"),
        ({"bias": torch.ones(6, 1)}, r"bias is torch.float32 \[6, 1\]"),
    ],
)
def test_wrong_values_are_named(change, message):
    given = {"x": torch.zeros(2, 6, 4, 4), "weight": torch.ones(6), "bias": torch.zeros(6), "groups": 2} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**given)
