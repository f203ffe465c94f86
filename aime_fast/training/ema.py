"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """A frozen copy of `model` in eval mode that follows its weights: theta_ema <- decay theta_ema + (1 - decay) theta.

    After n updates the decay is at most (1 + n) / (10 + n), so that a short run does not carry its random start along.
    Buffers (codebooks, their counts) are averages already and are copied. Make it before `model` is compiled, so that the copy
    stays plain. The copy is `ema.model`: validation and evaluation read it, and the Gram term compares against its encoder.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"optim.ema_decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = torch.zeros((), device=next(model.parameters()).device)  # on the device: a captured graph counts too
        self._averages, self._sources = list(self.model.parameters()), list(model.parameters())
        self._copies, self._buffers = list(self.model.buffers()), list(model.buffers())

    @torch.no_grad()
    def update(self, made: Tensor) -> None:
        """One step towards the model, in place, in a handful of launches; none where `made` (bool scalar) is false."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        difference = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(difference, (1.0 - decay) * made)
        torch._foreach_add_(self._averages, difference)
        self.updates += made
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)
