"""How an update runs: eagerly, compiled, or captured as CUDA graphs. What it does is in `step.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from aime_fast.runtime.cuda_graph import Captured

if TYPE_CHECKING:
    from aime_fast.training.step import TrainingStep

RECOMPILE_LIMIT = 64  # Dynamo's 8 is for all steps of a process together; each has several kinds of update


class Execution:
    """Calls `TrainingStep.update`, with its two halves as `mode` has them.

    Args:
        step: whose update is run.
        mode: "off", eagerly. "regions": the regions of the model that gain on a CPU are compiled (`compile_regions`). "whole": each half
            is compiled as one graph without breaks. "graph", CUDA only: "whole", and each kind of update is captured as one CUDA graph.
        backend: of `torch.compile` of the halves.

    Attributes:
        compute_gradients, apply_gradients: the halves as they are executed. compiled: whether they are compiled.

    Raises:
        ValueError: a gradient penalty with compiled halves.
    """

    def __init__(self, step: TrainingStep, mode: Literal["off", "regions", "whole", "graph"] = "off", backend: str | Callable = "inductor"):
        self.step, self.compiled = step, mode in ("whole", "graph")
        self.compute_gradients, self.apply_gradients = step.compute_gradients, step.apply_gradients
        self._captured: dict[tuple[bool, ...], Captured] = {}
        if mode == "regions":
            step.model.compile_regions()
        if self.compiled:
            if step.config.optim.gradient_penalty > 0:
                raise ValueError("--gradient-penalty differentiates twice, which cannot be traced; use it with --compile off")
            torch._dynamo.config.trace_autograd_ops = True  # the four task gradients are taken inside the compiled function
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            whole = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
            self.compute_gradients, self.apply_gradients = whole(step.compute_gradients), whole(step.apply_gradients)
        if mode == "graph":
            first = None
            for kind in itertools.product((False, True), repeat=2):
                self._captured[kind] = Captured(self._update(kind), step.device, memory_of=first)
                first = first or self._captured[kind]

    def __call__(self, kind: tuple[bool, ...], *inputs: Any) -> Any:
        """One update of that kind: inputs and results are those of `TrainingStep.update` after `run` and `kind`."""
        return (self._captured.get(kind) or self._update(kind))(*inputs)

    def _update(self, kind: tuple[bool, ...]) -> Callable:
        return partial(self.step.update, self, kind)
