"""GroupNorm followed by SiLU, in plain PyTorch.

A group g of frame n holds C / G channels at all H W places, M numbers in all. With w and b the weight and bias of a channel,

    mean = sum x / M        rstd = (sum (x - mean)^2 / M + eps)^(-1/2)
    xhat = (x - mean) rstd  u = w xhat + b        y = silu(u) = u s(u),   s(u) = 1 / (1 + e^-u).

The backward recomputes xhat, u and s from x, mean and rstd. With d = dL/dy s (1 + u (1 - s)), the gradient of u,

    dL/db = sum d        dL/dw = sum d xhat,        over frames and places
    dL/dx = rstd (w d - mean_g(w d) - xhat mean_g(w d xhat)),

where mean_g is the mean over the group: of its channels' sums over places, weighted with w, divided by M.

Sources: Wu and He, "Group Normalization", arXiv 1803.08494; Hendrycks and Gimpel, arXiv 1606.08415 (SiLU).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    """Raises ValueError, naming the value, where `kernels.group_norm.group_norm_silu` cannot work."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"group_norm_silu: x is {x.dtype} {list(x.shape)}; expected floats [N, C, H, W]")
    channels = x.shape[1]
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"group_norm_silu: {groups} groups do not divide the {channels} channels of x {list(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value.shape != (channels,) or not value.is_floating_point():
            raise ValueError(f"group_norm_silu: {name} is {value.dtype} {list(value.shape)}; expected floats [{channels}]")


def group_norm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = EPS) -> Tensor:
    """`kernels.group_norm.group_norm_silu` in plain PyTorch."""
    if x.dtype == weight.dtype or x.device.type == "cpu":  # PyTorch normalises bf16 and fp16 with fp32 weights on a CPU alone
        return F.silu(torch.group_norm(x, groups, weight, bias, eps)).to(x.dtype)
    return F.silu(torch.group_norm(x.to(weight.dtype), groups, weight, bias, eps)).to(x.dtype)


def backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias in one tensor [2, C], by the formulas above."""
    working = mean.dtype
    w, b = (t.to(working).view(groups, -1, 1) for t in (weight, bias))
    shape = (x.shape[0], *w.shape[:2], x.shape[2] * x.shape[3])
    normal = (x.to(working).reshape(shape) - mean[..., None, None]) * rstd[..., None, None]  # [N, G, C / G, HW]
    u = w * normal + b
    s = u.sigmoid()
    slope = grad.to(working).reshape(shape) * s * (1 + u * (1 - s))
    affine = torch.stack([(slope * normal).sum((0, 3)), slope.sum((0, 3))]).reshape(2, -1).to(weight.dtype)
    along, level = ((w * t).mean((2, 3), keepdim=True) for t in (slope * normal, slope))
    to_x = rstd[..., None, None] * (w * slope - level - normal * along)
    return to_x.reshape(x.shape).to(x.dtype), affine
