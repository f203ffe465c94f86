"""The RGB module: parameters, state, resume."""

import pytest
import torch
from torch import nn

from aime_fast.multi_task_learning.rgb import RGB
from kernels import rgb_direct

SPECIFICATION = {"mu": 0.9, "lam": 1.0, "alpha_steps": 3, "lr_inner": 0.2, "aggregation": "norm_weighted"}


def model_and_losses(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    x = torch.randn(8, 4, dtype=torch.float64)

    def losses():
        y = model(x)
        # The third reaches only the first layer, the fourth nothing at all.
        return [y.square().mean(), (y[:, 0] - 1).square().mean(), model[0](x).abs().mean(), torch.zeros(())]

    return [*model.parameters(), unused], losses


def test_backward_equals_the_direct_algorithm_and_accumulates():
    parameters, losses = model_and_losses()
    rgb = RGB()
    rgb.get_share_params = lambda: parameters
    size = sum(p.numel() for p in parameters)
    state = (torch.zeros(size).double(), torch.zeros(4).double(), False)
    for _ in range(3):
        flat = torch.zeros(4, size).double()
        for i, loss in enumerate(losses()[:3]):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            flat[i] = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, grads)])
        expected, d, angles, norm = rgb_direct(flat, *state, **SPECIFICATION)
        state = (d, angles, True)
        for p in parameters:
            p.grad = torch.ones_like(p)
        info = rgb.backward(losses())
        torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in parameters]), expected + 1)
        torch.testing.assert_close(rgb.direction, d)
        torch.testing.assert_close(rgb.angles, angles)
        torch.testing.assert_close(info["result_norm"], norm)
        torch.testing.assert_close(info["gradient_norms"], flat.norm(dim=1))
        with torch.no_grad():
            for p in parameters:
                p -= 0.1 * (p.grad - 1)
    assert rgb.task_num == 4
    assert rgb.device == torch.device("cpu")
    assert info["cosine"].diagonal().tolist() == pytest.approx([1, 1, 1, 0])


def test_state_goes_through_a_checkpoint(tmp_path):
    parameters, losses = model_and_losses()
    rgb = RGB()
    rgb.get_share_params = lambda: parameters
    rgb.backward(losses())
    torch.save(rgb.state_dict(), tmp_path / "rgb.pt")
    fresh = RGB()
    fresh.get_share_params = rgb.get_share_params
    fresh.load_state_dict(torch.load(tmp_path / "rgb.pt", weights_only=True))
    results = []
    for each in (rgb, fresh):
        for p in parameters:
            p.grad = None
        each.backward(losses())
        results.append(torch.cat([p.grad.reshape(-1) for p in parameters]))
    assert torch.equal(*results)
    assert torch.equal(rgb.direction, fresh.direction)
    nn.ModuleDict({"rgb": RGB()}).load_state_dict({f"rgb.{k}": v for k, v in rgb.state_dict().items()})  # as a part of something too


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_state_alone(bad):
    rgb = RGB()
    good = [[torch.randn(5)] for _ in range(3)]
    rgb.rotate(good)
    before = [x.clone() for x in rgb.state_dict().values()]
    broken = [[g[0].clone()] for g in good]
    broken[1][0][2] = bad
    _, info = rgb.rotate(broken)
    assert not torch.isfinite(info["result_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, rgb.state_dict().values()))


def test_misuse_is_explained():
    parameters, losses = model_and_losses()
    rgb = RGB()
    with pytest.raises(RuntimeError, match="get_share_params"):
        rgb.backward(losses())
    rgb.get_share_params = lambda: parameters
    rgb.backward(losses())
    with pytest.raises(ValueError, match="2 tasks, but the state is that of 4"):
        rgb.backward(losses()[:2])
    rgb.rep_grad = True
    with pytest.raises(NotImplementedError, match="rep_grad"):
        rgb.backward(losses())
    with pytest.raises(ValueError, match="median"):
        RGB(aggregation="median")
