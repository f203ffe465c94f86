"""How an update runs: eagerly, compiled, or captured as CUDA graphs. What it does is in `step.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from aime_fast.runtime.cuda_graph import Captured

if TYPE_CHECKING:
    from aime_fast.training.step import TrainingStep

RECOMPILE_LIMIT = 64  # Dynamo's 8 is for all steps of a process together; each has several kinds of update

Compile = Literal["off", "on", "graph"]


class Kind(NamedTuple):
    """What an update includes. Each kind is compiled and captured by itself."""

    train_discriminator: bool  # the discriminators learn too
    adversarial: bool  # the generator has an adversarial task


class Execution:
    """Calls `TrainingStep.update`, whose two halves are `compute_gradients` and `apply_gradients` of this object.

    Args:
        step: whose update is run.
        compile: "off", eagerly. "on": on a CPU the regions of the model that gain are compiled (`compile_regions`), with CUDA each half
            as one graph without breaks. "graph", CUDA only: "on", and each kind of update is captured as one CUDA graph.
        whole: compile the halves instead of regions; None: with CUDA.
        backend: of `torch.compile` of the halves.

    Attributes:
        compute_gradients, apply_gradients: the halves as they are executed. whole: whether they are compiled.

    Raises:
        ValueError: a gradient penalty with compiled halves.
    """

    def __init__(self, step: TrainingStep, compile: Compile, whole: bool | None = None, backend: str | Callable = "inductor"):
        self.step = step
        self.whole = compile != "off" and (step.device.type == "cuda" if whole is None else whole)
        self.compute_gradients, self.apply_gradients = step.compute_gradients, step.apply_gradients
        self._captured: dict[Kind, Captured] = {}
        if compile != "off" and not self.whole:
            step.model.compile_regions()
        if self.whole:
            if step.config.optim.gradient_penalty > 0:
                raise ValueError("--gradient-penalty differentiates twice, which cannot be traced; use it with --compile off")
            torch._dynamo.config.trace_autograd_ops = True  # the four task gradients are taken inside the compiled function
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            one_graph = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
            self.compute_gradients, self.apply_gradients = one_graph(step.compute_gradients), one_graph(step.apply_gradients)
        if compile == "graph":
            first = None
            for flags in itertools.product((False, True), repeat=len(Kind._fields)):
                captured = Captured(partial(step.update, Kind(*flags)), step.device, memory_of=first)
                self._captured[Kind(*flags)], first = captured, first or captured

    def __call__(self, kind: Kind, *inputs: Any) -> Any:
        """One update of that kind: arguments and results are those of `TrainingStep.update`."""
        return self._captured[kind](*inputs) if self._captured else self.step.update(kind, *inputs)
