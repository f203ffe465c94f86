"""RGB as published, on whole vectors, with angles by autograd: tests and benchmarks compare with it. See `kernels.rgb.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.rgb.reference import ALIGNED, MAX_ANGLE, MIN_CONSENSUS, MIN_NORM


def rgb_direct(
    gradients: Tensor,
    direction: Tensor,
    angles: Tensor,
    has_direction: bool,
    *,
    mu: float,
    lam: float,
    alpha_steps: int,
    lr_inner: float,
    aggregation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Consensus, direction, planes of rotation, angles, aggregation: the five steps of the algorithm.

    Arguments and results are those of `kernels.rgb.rgb_rotate` with gradients [n, P]. It waits for the device.
    """
    active = gradients.norm(dim=1) > MIN_NORM
    g = gradients[active]
    n = max(len(g), 1)
    norm = g.norm(dim=1, keepdim=True)
    gbar = g / norm

    y = gbar.sum(0) / n
    has_consensus = bool(y.norm() > MIN_CONSENSUS)
    has_old = bool(has_direction) and bool(direction.norm() > MIN_NORM)
    d = torch.zeros_like(direction)
    if has_old and has_consensus:
        y = y / y.norm()
        mixed = mu * direction + (1 - mu) * y
        d = mixed / mixed.norm() if mixed.norm() >= MIN_CONSENSUS else y
    elif has_consensus or has_old:
        d = y / y.norm() if has_consensus else direction / direction.norm()

    p = gbar @ d
    free = (p.abs() <= ALIGNED) & bool(has_consensus or has_old) & (n > 1)
    w = d - p.unsqueeze(1) * gbar
    w = torch.where(free.unsqueeze(1), w / w.norm(dim=1, keepdim=True), torch.zeros_like(w))

    def rotated(angle: Tensor) -> Tensor:
        return angle.cos().unsqueeze(1) * gbar + angle.sin().unsqueeze(1) * w

    angle = torch.where(free, angles[active], torch.zeros_like(p))
    for _ in range(alpha_steps):
        angle.requires_grad_(True)
        with torch.enable_grad():
            r = rotated(angle)
            conflict = sum((1 - r[i] @ r[j] for i in range(len(r)) for j in range(i + 1, len(r))), start=angle.new_zeros(()))
            objective = conflict / max(n * (n - 1), 1) + lam / (4 * n) * (r - gbar).square().sum()
            slope = torch.autograd.grad(objective, angle)[0]
        angle = torch.where(free, (angle.detach() - lr_inner * slope).clamp(0, MAX_ANGLE), torch.zeros_like(p))

    new_angles = angles.clone()
    new_angles[active] = angle
    r = rotated(angle)
    result = (norm * r).sum(0) if aggregation == "norm_weighted" else r.sum(0) / n
    return result, d, new_angles, result.norm()
