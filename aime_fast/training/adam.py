"""Adam on one flat vector, with everything that changes from step to step on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_factor(norm: Tensor, largest: float) -> Tensor:
    """What a gradient of this norm (a scalar) is multiplied by, so that its norm is at most `largest`."""
    return (largest / (norm + 1e-6)).clamp(max=1.0)


class Adam:
    """Kingma and Ba, arXiv 1412.6980, algorithm 1, for a flat parameter vector.

    `torch.optim.Adam` cannot be compiled into the step: its fused kernel has no meta implementation, its step is a graph break. Here all
    state is three tensors, and an update that must not be made is a multiplication by zero, so nothing is read back to the host.

    Args:
        parameters: flat [P], changed in place by `update`.
        beta1, beta2, eps: as in the paper.
        scale: [P] or None, multiplies the learning rate of each element.
    """

    def __init__(self, parameters: Tensor, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, scale: Tensor | None = None):
        self.parameters, self.scale = parameters, scale
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.mean, self.square = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.updates = torch.zeros((), device=parameters.device)

    @torch.no_grad()
    def update(self, gradient: Tensor, learning_rate: Tensor, made: Tensor) -> None:
        """One step along `gradient` [P]; nothing changes where `made` (bool scalar) is false, whatever the gradient holds."""
        gradient = torch.where(made, gradient, 0.0)
        made = made.to(self.updates.dtype)
        self.updates += made
        count = self.updates.clamp_min(1.0)
        self.mean.lerp_(gradient, (1 - self.beta1) * made)
        self.square.lerp_(gradient.square(), (1 - self.beta2) * made)
        rate = learning_rate * made / (1 - self.beta1**count)
        step = self.mean / (self.square / (1 - self.beta2**count)).sqrt_().add_(self.eps)
        if self.scale is not None:
            step *= self.scale
        self.parameters -= rate * step

    def state_dict(self) -> dict[str, Tensor]:
        """Both moments [P] and the number of updates."""
        return {"mean": self.mean, "square": self.square, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`; tensors may lie on any device."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
