"""How an update runs: eagerly, compiled, or captured as CUDA graphs. What it does is in `step.py`."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from aime_fast.runtime import ranks
from aime_fast.runtime.cuda_graph import Graphs
from aime_fast.runtime.machine import Way

if TYPE_CHECKING:
    from aime_fast.training.step import TrainingStep

RECOMPILE_LIMIT = 64  # Dynamo's 8 is for all steps of a process together; each has several kinds of update


class Kind(NamedTuple):
    """What an update includes. Each kind is compiled and captured by itself."""

    train_discriminator: bool  # the discriminators learn too
    adversarial: bool  # the generator has an adversarial task


class Execution:
    """Calls `TrainingStep.update` and `update_pictures`; the two halves of the former are `compute_gradients` and `apply_gradients` here.

    Args:
        step: whose updates are run.
        way: what of them is compiled, and whether they are captured.
        backend: of `torch.compile` of the halves.

    Attributes:
        compute_gradients, apply_gradients: the halves as they are executed. whole: whether they are compiled.

    Raises:
        ValueError: a gradient penalty with compiled halves, or several processes, whose gradients these would not average.
    """

    def __init__(self, step: TrainingStep, way: Way, backend: str | Callable = "inductor"):
        self.step, self.whole = step, way.whole
        self.compute_gradients, self.apply_gradients = step.compute_gradients, step.apply_gradients
        self._graphs = Graphs(step.device) if way.captured else None
        if way.regions:
            step.model.compile_regions()
        if self.whole:
            if ranks.of_run().size > 1:
                raise ValueError("several processes cannot compile whole updates; use another --compile")
            if step.config.optim.gradient_penalty > 0:
                raise ValueError("--gradient-penalty differentiates twice, which cannot be traced; use another --compile than whole")
            torch._dynamo.config.trace_autograd_ops = True  # the four task gradients are taken inside the compiled function
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            one_graph = partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
            self.compute_gradients, self.apply_gradients = one_graph(step.compute_gradients), one_graph(step.apply_gradients)

    def __call__(self, kind: Kind, *inputs: Any) -> Any:
        """One update of that kind: arguments and results are those of `TrainingStep.update`."""
        return self._run(self.step.update, kind, *inputs)

    def pictures(self, perceives: bool, *inputs: Any) -> Any:
        """One update on pictures: arguments and results are those of `TrainingStep.update_pictures`."""
        return self._run(self.step.update_pictures, perceives, *inputs)

    def _run(self, function: Callable, kind: Hashable, *inputs: Any) -> Any:
        """`function(kind, *inputs)`, captured or not: each kind is a graph of its own."""
        run = partial(function, kind)
        if self._graphs is not None:
            run = self._graphs.of((function.__name__, kind), run)
        return run(*inputs)
