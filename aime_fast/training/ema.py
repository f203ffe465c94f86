"""An exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aime_fast.training.arena import Arena


class EMA:
    """A frozen copy of `model` in eval mode that follows its weights: theta_ema <- decay theta_ema + (1 - decay) theta.

    After n updates the decay is at most (1 + n) / (10 + n), so that the random start has little weight in a short run.
    Buffers (codebooks, their counts) are averages already and are copied. Make it before `model` is compiled, so that the copy
    stays plain. The copy is `ema.model`: validation and evaluation read it, and the Gram term compares against its encoder.

    Args:
        model: on its device.
        decay: in [0, 1).
        arenas: hold all parameters of `model`, each once.
    """

    def __init__(self, model: nn.Module, decay: float, arenas: Sequence[Arena]):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"optim.ema_decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = torch.zeros((), device=next(model.parameters()).device)  # on the device: a captured graph counts too
        copied = dict(zip(model.parameters(), self.model.parameters()))
        self._arenas = [Arena(copied[p] for p in arena.parameters) for arena in arenas]
        self._pairs = [(mine.flat, arena.flat) for mine, arena in zip(self._arenas, arenas)]
        self._copies, self._buffers = list(self.model.buffers()), list(model.buffers())

    @torch.no_grad()
    def update(self, made: Tensor) -> None:
        """One step towards the model, in place; none where `made` (bool scalar) is false."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        for average, weights in self._pairs:
            average.lerp_(weights, (1.0 - decay) * made)
        self.updates += made
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)

    @torch.no_grad()
    def adopt(self, trained: nn.Module, model_part: nn.Module) -> None:
        """Makes what was trained on the averages alone the weights of the model too, and brings averages that have moved back.

        Args: trained: modules of `self.model`; model_part: the same modules of the model.
        """
        for mine, theirs in zip(trained.state_dict().values(), model_part.state_dict().values()):
            theirs.copy_(mine)
        for arena in self._arenas:
            for parameter, view in zip(arena.parameters, arena.split(arena.flat)):
                if parameter.data_ptr() != view.data_ptr():
                    view.copy_(parameter.detach())
                    parameter.data = view
