"""The Kumaraswamy kernels against the float64 reference, on a GPU or in Triton's interpreter.

The budget comes from data: a kernel's error may be twice that of the reference run in the inputs' own precision, plus rounding.
"""

import pytest
import torch
from architectures import distinct
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kernels import backend
from kernels.kumaraswamy import kumaraswamy_sticks, kumaraswamy_sticks_reference, launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("v", "pi", "log pi", "kl", "to log a", "to log b", "to alpha", "to log alpha")

pytestmark = pytest.mark.usefixtures("triton_kernels")


def problem(seed, shape, ends=False, alpha_shape=None, log_alpha=True, dtype=torch.float32):
    """[log_a, log_b, u, alpha, log_alpha] of sticks `shape`; `ends`: parameters and uniforms at and next to the ends of their range."""
    generator = torch.Generator().manual_seed(seed)
    log_a, log_b = (torch.rand(2, *shape, generator=generator) * 10 - 5).unbind(0)
    u = torch.rand(shape, generator=generator)
    if ends:
        info = torch.finfo(torch.float32)
        pick = torch.randint(0, 7, (3, *shape), generator=generator)
        parameters = torch.tensor([-5.0, 5.0, 0.0, 1e-7, -1e-7, -4.3, 2.1])
        uniforms = torch.tensor([info.tiny, 1e-20, 1e-3, 0.5, 0.999, 1 - 2**-23, 1 - 2**-23])
        log_a, log_b, u = parameters[pick[0]], parameters[pick[1]], uniforms[pick[2]]
    alpha = torch.rand((*shape[:-1], 1) if alpha_shape is None else alpha_shape, generator=generator) * 10 + 0.05
    moments = (alpha, alpha.log() - 0.2 if log_alpha else None)
    u = u.clamp(torch.finfo(torch.float32).tiny, 1 - 2**-23)
    return [x if x is None else x.to(DEVICE, dtype) for x in (log_a, log_b, u, *moments)]


def run(function, inputs, kl, dtype, weights):
    """The outputs, and the gradients of their sum weighted with `weights` (None: the output is not used)."""
    inputs = [x if x is None else x.detach().to(dtype).requires_grad_(i != 2) for i, x in enumerate(inputs)]
    sticks = function(*inputs, kl)
    loss = sum((x.double() * w).sum() for x, w in zip(sticks, weights) if x is not None and w is not None)
    wanted = [x for i, x in enumerate(inputs) if i != 2 and x is not None]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*(x.detach() for x in sticks if x is not None), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients))]


def errors(values, exact):
    return [(x.double() - y).abs() for x, y in zip(values, exact)]


def check(inputs, kl="exact", weights=None, larger=None, scale=0.0):
    """Kernel against the float64 reference. `larger`: a problem of the same kind with more draws, to know the budget better.

    `scale`: size of the terms of a gradient, where they may cancel."""
    inputs, dtype = list(inputs), inputs[0].dtype
    budget_inputs = inputs if larger is None else larger

    def all_weights(of):
        shape = of[0].shape
        generator = torch.Generator().manual_seed(0)
        shapes = (shape, (*shape[:-1], shape[-1] + 1), (*shape[:-1], shape[-1] + 1), shape)
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes]

    chosen = [all_weights(x) if weights is None else weights for x in (inputs, budget_inputs)]
    kernel = run(kumaraswamy_sticks, inputs, kl, dtype, chosen[0])
    exact = run(kumaraswamy_sticks_reference, inputs, kl, torch.float64, chosen[0])
    eager_exact = exact if larger is None else run(kumaraswamy_sticks_reference, larger, kl, torch.float64, chosen[1])
    eager = run(kumaraswamy_sticks_reference, budget_inputs, kl, dtype, chosen[1])
    eps = torch.finfo(dtype).eps
    for i, (ours, theirs, x, y, z) in enumerate(zip(errors(kernel, exact), errors(eager, eager_exact), kernel, exact, eager_exact)):
        assert torch.isfinite(x).all(), NAMES[i]
        assert x.dtype == dtype
        assert x.shape == y.shape
        assert x.is_contiguous()
        assert ours.max() <= 2 * theirs.max() + 4 * eps * max(z.abs().max().item(), scale), NAMES[i]
        if i < 4:  # values have few cancellations: small ones are held to their own size as well
            assert (ours / (1 + y.abs())).max() <= 2 * (theirs / (1 + z.abs())).max() + 8 * eps, NAMES[i]
    return kernel


@settings(deadline=None, max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(0, (17, 3), True, "exact", "row", True)
@example(1, (2, 37), True, "series10", "scalar", False)
@example(2, (16, 7), False, "exact", "stick", True)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(2, 37), (3, 7), (8, 7), (15, 1), (15, 7), (16, 7), (17, 3), (64, 1)]),  # each tile costs the interpreter time
    st.booleans(),
    st.sampled_from(["exact", "exact", "series10"]),
    st.sampled_from(["row", "stick", "scalar"]),
    st.booleans(),
)
def test_forward_and_backward_within_the_budget(seed, sizes, ends, kl, alpha, log_alpha):
    components, rows = sizes

    def make(rows):
        shape = (rows, components - 1)
        alpha_shape = {"row": (rows, 1), "stick": shape, "scalar": ()}[alpha]
        return problem(seed, shape, ends, alpha_shape, log_alpha)

    check(make(rows), kl, larger=make(max(rows, 1024 // components)))


@pytest.mark.parametrize("architecture", distinct(launch.TILES))
@pytest.mark.parametrize("kl", ["exact", "series10", None])
def test_each_committed_configuration_on_ragged_tiles(architecture, kl):
    with backend.pin_architecture(architecture):
        inputs = problem(5, ({None: 67, "exact": 5, "series10": 9}[kl], 14))  # each more than a tile, the last one ragged
        if kl is None:
            inputs[3:] = None, None
        first = check(inputs, kl or "exact")
        again = check(inputs, kl or "exact")
    assert all(torch.equal(x, y) for x, y in zip(first, again))  # the same bits every time


@pytest.mark.parametrize("used", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)])
def test_batch_dimensions_and_stride_0_gradients_of_some_outputs(used):
    # Halves of one tensor, as the model's head makes them, and alpha without one of the dimensions.
    log_a, log_b = (torch.rand(2, 3, 4, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 10 - 5).chunk(2, -1)
    _, _, u, alpha, log_alpha = problem(1, (2, 3, 4, 5), alpha_shape=(3, 1, 1))
    weights = [torch.ones((), dtype=torch.float64, device=DEVICE) if x else None for x in used]
    check([log_a, log_b, u, alpha, log_alpha], weights=weights, scale=1.0)
    check([log_a[0, 0].t(), log_b[0, 0].t(), u[0, 0].t(), alpha[0], None], weights=weights, scale=1.0)  # columns apart: made contiguous


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_worked_in_float32(dtype):
    inputs = problem(2, (5, 14), dtype=dtype)
    check(inputs)
    weights = [torch.ones((), device=DEVICE)] * 4
    low, single = (run(kumaraswamy_sticks, inputs, "exact", d, weights) for d in (dtype, torch.float32))
    # Rounded once, at the end: to nearest on a GPU, while the interpreter cuts bfloat16 off and has its own way with subnormals.
    cuts = backend.INTERPRETED and dtype == torch.bfloat16
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 2e-38} if cuts else {"rtol": 0, "atol": 0}
    for ours, theirs in zip(low, single):
        torch.testing.assert_close(ours, theirs.to(dtype), **tolerance)


def test_every_uniform_and_parameter_gives_finite_numbers():
    ends = torch.tensor([-5.0, 0.0, 5.0])
    uniforms = torch.tensor([0.0, 1e-45, torch.finfo(torch.float32).tiny, 1e-30, 0.5, 1 - 2**-23, 1 - 2**-24, 1.0])
    log_a, log_b, u = (x.flatten().view(-1, 4).to(DEVICE) for x in torch.meshgrid(ends, ends, uniforms, indexing="ij"))
    inputs = [log_a.requires_grad_(), log_b.requires_grad_(), torch.full((), 3.0, device=DEVICE, requires_grad=True)]
    sticks = kumaraswamy_sticks(*inputs[:2], u, inputs[2])
    for x in (*sticks, *torch.autograd.grad(sum(x.sum() for x in sticks), inputs)):
        assert torch.isfinite(x).all()
    torch.testing.assert_close(sticks.pi.sum(-1), torch.ones(len(u), device=DEVICE), rtol=0, atol=1e-6)


def test_float64_and_no_rows():
    inputs = [x.double() for x in problem(4, (5, 3))]
    for ours, theirs in zip(kumaraswamy_sticks(*inputs), kumaraswamy_sticks_reference(*inputs)):
        assert torch.equal(ours, theirs)
    log_a, log_b = torch.zeros(2, 0, 3, device=DEVICE, requires_grad=True).unbind(0)
    alpha = torch.ones(1, 1, device=DEVICE, requires_grad=True)
    sticks = kumaraswamy_sticks(log_a, log_b, torch.zeros(0, 3, device=DEVICE), alpha)
    assert sticks.pi.shape == (0, 4)
    assert torch.autograd.grad(sticks.kl.sum(), alpha)[0].item() == 0


def test_operators_are_sound():
    torch.use_deterministic_algorithms(False)  # opcheck compares memory that it does not write itself
    log_a, log_b, u, alpha, log_alpha = (x.requires_grad_(i != 2) for i, x in enumerate(problem(6, (3, 4))))
    for arguments in ((u, None, None, "exact"), (u, alpha, None, "series10"), (u, alpha, log_alpha, "series10")):
        torch.library.opcheck(torch.ops.aime_fast.kumaraswamy_sticks, (log_a, log_b, *arguments))
    inputs = [x.detach() for x in (log_a, log_b, u, alpha, log_alpha)]
    grads = (None, torch.ones(3, 5, device=DEVICE), None, torch.ones(3, 4, device=DEVICE))
    torch.library.opcheck(torch.ops.aime_fast.kumaraswamy_sticks_backward, (*inputs, "series10", *grads))


def test_compiles_whole():
    inputs = problem(7, (9, 14))

    def loss(log_a, log_b, u, alpha, log_alpha):
        sticks = kumaraswamy_sticks(2 * log_a.tanh(), 2 * log_b.tanh(), u, alpha, log_alpha)
        return (sticks.log_pi * sticks.pi).sum() + sticks.kl.sum()

    wanted = [inputs[i].requires_grad_() for i in (0, 1, 3, 4)]
    expected, compiled = loss(*inputs), torch.compile(loss, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, wanted), torch.autograd.grad(expected, wanted))
