"""RGB in Gram space against the five steps done directly on whole vectors, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.rgb import gram_matrix, rgb_rotate
from kernels.rgb.direct import rgb_direct

SIZE = 12
SPECIFICATION = {"mu": 0.9, "lam": 1.0, "alpha_steps": 3, "lr_inner": 0.2, "aggregation": "norm_weighted"}
kinds = st.lists(st.sampled_from(["random", "zero", "equal", "opposite", "tiny"]), min_size=1, max_size=6)
settings_of_rgb = st.fixed_dictionaries(
    {
        "aggregation": st.sampled_from(["norm_weighted", "mean"]),
        "mu": st.sampled_from([0.0, 0.5, 0.9]),
        "lam": st.sampled_from([0.0, 1.0]),
        "lr_inner": st.sampled_from([0.2, 3.0]),  # the large step drives angles to their bounds
        "alpha_steps": st.integers(0, 4),
    }
)


def make(kinds, generator, size=SIZE):
    rows = []
    for kind in kinds:
        fresh = torch.randn(size, generator=generator, dtype=torch.float64) * 10 ** torch.randint(-2, 3, (), generator=generator)
        previous = rows[-1] if rows else fresh
        rows.append(
            {"random": fresh, "zero": torch.zeros_like(fresh), "equal": previous, "opposite": -2 * previous, "tiny": 1e-9 * fresh}[kind]
        )
    return torch.stack(rows)


@settings(deadline=None, max_examples=120)
@given(st.lists(kinds, min_size=1, max_size=1), st.integers(0, 2**31), settings_of_rgb)
def test_gram_space_equals_whole_vectors(kinds, seed, options):
    generator = torch.Generator().manual_seed(seed)
    n = len(kinds[0])
    ours = theirs = (torch.zeros(SIZE).double(), torch.zeros(n).double(), torch.tensor(False))
    for step in range(4):
        # The second step repeats the kinds with the tasks turned round, so that a task dies and comes back.
        g = make(kinds[0] if step % 2 == 0 else kinds[0][::-1], generator)
        result, d, angles, norm = rgb_rotate(g, *ours, **options)
        expected = rgb_direct(g, *theirs, **options)
        scale = g.norm() + 1
        torch.testing.assert_close(result / scale, expected[0] / scale, rtol=0, atol=1e-9)
        torch.testing.assert_close(d, expected[1], rtol=0, atol=1e-9)
        torch.testing.assert_close(angles, expected[2], rtol=0, atol=1e-9)
        torch.testing.assert_close(norm / scale, result.norm() / scale, rtol=0, atol=1e-6)  # a square root of rounding at worst
        assert torch.isfinite(result).all()
        ours, theirs = (d, angles, torch.tensor(True)), (expected[1], expected[2], torch.tensor(True))


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(0, 2**31), st.sampled_from(["norm_weighted", "mean"]))
def test_zero_gradient_is_as_if_the_task_were_not_there(n, seed, aggregation):
    generator = torch.Generator().manual_seed(seed)
    g = make(["random"] * n, generator)
    d = torch.nn.functional.normalize(g.sum(0), dim=0)
    angles = torch.rand(n, generator=generator, dtype=torch.float64)
    absent = int(torch.randint(n, (), generator=generator))
    rest = [i for i in range(n) if i != absent]
    with_zero = g.clone()
    with_zero[absent] = 0
    full = rgb_rotate(with_zero, d, angles, torch.tensor(True), **SPECIFICATION | {"aggregation": aggregation})
    small = rgb_rotate(g[rest], d, angles[rest], torch.tensor(True), **SPECIFICATION | {"aggregation": aggregation})
    for i in (0, 1, 3):
        torch.testing.assert_close(full[i], small[i])
    torch.testing.assert_close(full[2][rest], small[2])
    assert full[2][absent] == angles[absent]


def test_one_task_is_its_own_gradient():
    state = (torch.zeros(SIZE).double(), torch.zeros(1).double(), torch.tensor(False))
    for seed in range(3):
        g = make(["random"], torch.Generator().manual_seed(seed))
        result, d, angles, _ = rgb_rotate(g, *state, **SPECIFICATION)
        torch.testing.assert_close(result, g[0])
        state = (d, angles, torch.tensor(True))


def test_rotation_reduces_conflict():
    g = torch.tensor([[1.0, 0.2, 0.0], [-0.8, 0.5, 0.3]], dtype=torch.float64)
    _, d, angles, _ = rgb_rotate(g, torch.zeros(3).double(), torch.zeros(2).double(), torch.tensor(False), **SPECIFICATION)
    result = [
        rgb_rotate(torch.stack([g[i], 0 * g[i]]), d, torch.zeros(2).double(), torch.tensor(True), **SPECIFICATION)[0] for i in range(2)
    ]  # alone, a task is not rotated
    torch.testing.assert_close(torch.stack(result), g)
    assert (angles > 0).all()
    gbar = torch.nn.functional.normalize(g, dim=1)
    p = gbar @ d
    w = torch.nn.functional.normalize(d - p.unsqueeze(1) * gbar, dim=1)
    r = angles.cos().unsqueeze(1) * gbar + angles.sin().unsqueeze(1) * w
    assert r[0] @ r[1] > gbar[0] @ gbar[1]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_lists_of_tensors_with_gaps_equal_one_matrix(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (), (4,), (1, 5)]
    sizes = [6, 1, 4, 5]
    present = torch.rand(3, 4, generator=generator) < 0.6
    present[0] |= ~present.any(0)
    full = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    lists = []
    for task in range(3):
        pieces = full[task].split(sizes)  # views
        for i, piece in enumerate(pieces):
            piece.mul_(present[task, i])
        lists.append([p.view(s).clone() if present[task, i] else None for i, (p, s) in enumerate(zip(pieces, shapes))])
    d = torch.nn.functional.normalize(torch.randn(16, generator=generator, dtype=torch.float64), dim=0)
    angles = torch.full((3,), 0.3).double()
    torch.testing.assert_close(gram_matrix(lists, d), torch.cat([full, d[None]]) @ torch.cat([full, d[None]]).T)
    ours = rgb_rotate(lists, d, angles, torch.tensor(True), **SPECIFICATION)
    expected = rgb_rotate(full, d, angles, torch.tensor(True), **SPECIFICATION)
    assert [tuple(p.shape) for p in ours[0]] == shapes
    torch.testing.assert_close(torch.cat([p.reshape(-1) for p in ours[0]]), expected[0])
    for a, b in zip(ours[1:], expected[1:]):
        torch.testing.assert_close(a, b)


def test_float32_is_close_to_float64_over_many_numbers():
    g = make(["random", "opposite", "random", "random"], torch.Generator().manual_seed(0), size=300_000)
    d = torch.nn.functional.normalize(g.sum(0), dim=0)
    single = rgb_rotate(g.float(), d.float(), torch.zeros(4), torch.tensor(True), **SPECIFICATION)
    double = rgb_direct(g, d, torch.zeros(4).double(), True, **SPECIFICATION)
    assert single[0].dtype == torch.float32
    for ours, theirs in zip(single, double):
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


def test_errors_name_the_place():
    g = torch.randn(2, 3)
    with pytest.raises(ValueError, match="parameter 1"):
        gram_matrix([[g[0], None], [g[1], None]], torch.zeros(3))
    with pytest.raises(ValueError, match="hold 3 numbers and the direction 4"):
        gram_matrix(g, torch.zeros(4))
    with pytest.raises(ValueError, match="median"):
        rgb_rotate(g, torch.zeros(3), torch.zeros(2), torch.tensor(False), **SPECIFICATION | {"aggregation": "median"})


def test_compiles_whole():
    g = [[torch.randn(3, 2), None, torch.randn(4)], [torch.randn(3, 2), torch.randn(5), None]]
    arguments = (g, torch.randn(15), torch.zeros(2), torch.tensor(True))
    compiled = torch.compile(rgb_rotate, fullgraph=True, backend="aot_eager")(*arguments, **SPECIFICATION)
    eager = rgb_rotate(*arguments, **SPECIFICATION)
    for a, b in zip([*compiled[0], *compiled[1:]], [*eager[0], *eager[1:]]):
        torch.testing.assert_close(a, b)
