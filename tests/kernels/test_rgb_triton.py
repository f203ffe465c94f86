"""The Triton kernels of RGB against the float64 reference."""

import pytest
import torch
from architectures import distinct
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels.backend import pin_architecture, select_kernels
from kernels.rgb import launch, rgb_rotate, rgb_rotate_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("triton_kernels")
EPS = torch.finfo(torch.float32).eps
SPECIFICATION = {"mu": 0.9, "lam": 1.0, "alpha_steps": 3, "lr_inner": 0.2, "aggregation": "norm_weighted"}


def make(n, size, seed=0, zero=(), dtype=torch.float32):
    """Gradients of very different lengths, an old direction of length 1, angles."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, size, generator=generator) * 10.0 ** torch.randint(-3, 3, (n, 1), generator=generator)
    g[list(zero)] = 0
    d = torch.randn(size, generator=generator)
    return [x.to(DEVICE) for x in (g.to(dtype), d / d.norm(), torch.rand(n, generator=generator), torch.tensor(True))]


def reference(inputs, dtype=torch.float64, **options):
    select_kernels("reference")
    outputs = rgb_rotate(*(x.to(dtype) if x.is_floating_point() else x for x in inputs), **SPECIFICATION | options)
    select_kernels("triton")
    return outputs


def assert_within_budget(inputs, **options):
    kernel, eager, exact = (
        rgb_rotate(*inputs, **SPECIFICATION | options),
        reference(inputs, torch.float32, **options),
        reference(inputs, **options),
    )
    for name, k, e, x in zip(("result", "direction", "angles", "norm"), kernel, eager, exact):
        error, yardstick = (k.double() - x).abs().max(), (e.double() - x).abs().max()
        assert error <= 2 * yardstick + 8 * EPS * x.abs().max(), f"{name}: {error:.2e}, eager {yardstick:.2e}"


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(n=1, size=31, seed=0, zero=set(), aggregation="norm_weighted", lam=1.0)
@example(n=1, size=1, seed=1, zero={0}, aggregation="mean", lam=0.0)
@example(n=4, size=2053, seed=2, zero=set(), aggregation="norm_weighted", lam=10.0)
@example(n=9, size=1, seed=3, zero={2, 8}, aggregation="norm_weighted", lam=1.0)
@example(n=5, size=1021, seed=4, zero={0, 3}, aggregation="mean", lam=1.0)
@given(
    n=st.integers(1, 9),
    size=st.sampled_from([1, 31, 1021]),
    seed=st.integers(0, 2**31),
    zero=st.sets(st.integers(0, 8), max_size=2),
    aggregation=st.sampled_from(["norm_weighted", "mean"]),
    lam=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_kernel_is_as_good_as_eager(n, size, seed, zero, aggregation, lam):
    inputs = make(n, size, seed, {z for z in zero if z < n})
    if size == 1:  # all vectors are parallel, and whether they count as aligned is rounding
        inputs[0] = inputs[0].sign() * 2.0 ** torch.arange(n, device=DEVICE).view(n, 1)
        inputs[1] = torch.ones(1, device=DEVICE)
    assert_within_budget(inputs, aggregation=aggregation, lam=lam)


@pytest.mark.parametrize("arch", distinct(launch.GRAM, launch.ROTATION, launch.COMBINE))
@pytest.mark.parametrize("n", [1, 4, 5, 8, 9, 15])
def test_every_configuration(arch, n):
    with pin_architecture(arch):
        assert_within_budget(make(n, 1300))


def test_several_steps_from_no_direction():
    state = [torch.zeros(700, device=DEVICE), torch.zeros(4, device=DEVICE), torch.tensor(False, device=DEVICE)]
    exact = [state[0].double(), state[1].double(), state[2].clone()]
    for step in range(4):
        g = make(4, 700, seed=step)[0]
        result, _, norm = rgb_rotate_(g, *state, **SPECIFICATION)
        select_kernels("reference")
        expected, _, exact_norm = rgb_rotate_(g.double(), *exact, **SPECIFICATION)
        select_kernels("triton")
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        torch.testing.assert_close(norm, exact_norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(state[0].double(), exact[0], rtol=0, atol=1e-6)
        assert bool(state[2])


@pytest.mark.parametrize("kind", ["equal", "opposite", "zero"])
def test_degenerate_gradients(kind):
    g, _, angles, _ = make(2, 64)
    g[1] = {"equal": g[0], "opposite": -2 * g[0], "zero": torch.zeros_like(g[0])}[kind]
    inputs = [g, torch.zeros(64, device=DEVICE), angles, torch.tensor(False, device=DEVICE)]
    for k, x in zip(rgb_rotate(*inputs, **SPECIFICATION), reference(inputs)):
        torch.testing.assert_close(k.double(), x.double(), rtol=1e-5, atol=1e-5)


def test_half_precision_gradients_padded_rows_out_and_clipping():
    g, d, angles, flag = make(4, 1003, dtype=torch.bfloat16)
    padded = torch.zeros(4, 1024, dtype=g.dtype, device=DEVICE)[:, :1003].copy_(g)
    out = torch.empty(1003, device=DEVICE)
    result, gram, norm = rgb_rotate_(padded, d.clone(), angles.clone(), flag.clone(), **SPECIFICATION, max_norm=0.5, out=out)
    assert result is out
    exact, *_, exact_norm = reference([g, d, angles, flag], max_norm=0.5)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(norm, exact_norm, rtol=1e-6, atol=0)
    assert out.norm().item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(gram.diagonal()[:4].sqrt(), g.double().norm(dim=1), rtol=1e-6, atol=0)
    plain = rgb_rotate(g, d, angles, flag, **SPECIFICATION)[0]
    assert plain.dtype == torch.bfloat16


def test_lists_with_gaps():
    g, d, angles, flag = make(3, 30)
    g[1, :10] = 0
    lists = [[row[:10].view(2, 5), row[10:]] for row in g]
    lists[1][0] = None
    result, *rest = rgb_rotate(lists, d, angles, flag, **SPECIFICATION)
    exact, *others = reference([g, d, angles, flag])
    assert [r.shape for r in result] == [(2, 5), (20,)]
    torch.testing.assert_close(torch.cat([r.reshape(-1) for r in result]).double(), exact, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(rest, others):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_leaves_the_state():
    g, d, angles, _ = make(4, 100)
    g[2, 7] = torch.nan
    state = [d.clone(), angles.clone(), torch.tensor(False, device=DEVICE)]
    _, _, norm = rgb_rotate_(g, *state, **SPECIFICATION)
    assert not torch.isfinite(norm)
    assert torch.equal(state[0], d)
    assert torch.equal(state[1], angles)
    assert not bool(state[2])


def test_float64_and_many_tasks_run_the_reference():
    g, d, angles, flag = make(16, 50)
    for inputs in ([g, d, angles, flag], [g[:3].double(), d.double(), angles[:3].double(), flag]):
        for k, x in zip(rgb_rotate(*inputs, **SPECIFICATION), reference(inputs, inputs[0].dtype)):
            assert torch.equal(k, x)


def test_same_bits_every_time():
    inputs = make(4, 20_001)
    for first, second in zip(rgb_rotate(*inputs, **SPECIFICATION), rgb_rotate(*inputs, **SPECIFICATION)):
        assert torch.equal(first, second)


def test_op_registration():
    g, d, angles, flag = make(4, 100)
    arguments = (g, d, angles, flag, torch.zeros(100, device=DEVICE), *SPECIFICATION.values(), 1.0)
    torch.library.opcheck(torch.ops.aime_fast.rgb_rotate_, arguments)
    select_kernels("reference")
    torch.library.opcheck(torch.ops.aime_fast.rgb_rotate_, arguments)


def test_compiles_whole():
    inputs = make(4, 100)
    compiled = torch.compile(rgb_rotate, fullgraph=True)(*inputs, **SPECIFICATION)
    for ours, eager in zip(compiled, rgb_rotate(*inputs, **SPECIFICATION)):
        assert torch.equal(ours, eager)
