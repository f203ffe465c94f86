"""What compiling the regions of an update costs, measured without a GPU: `python -m profiling.roofline --compile-seconds`.

An update of tasks and discriminators, and one of pictures where a tier has such, are called on fake CUDA tensors (`fake_cuda`,
`steps.FakeUpdates`) with the regions of `--compile on` and `graph` compiled by Inductor. Processor seconds of this process and of what it
starts (ptxas) are added up by region: those of tracing (Dynamo and AOTAutograd, forward and backward), of lowering (Inductor, from a graph
of operators to source), and of Triton (from source to cubin, every configuration that a first launch would choose from). A run on a GPU
traces and lowers on one core and gives Triton's part to as many processes as there are cores. Caches are empty and stay so.

Left out, since they need the device: the choice between configurations, the measurement of whether a matrix product is faster with padding,
and the folding of constants. What is compiled is not run: the traced operators are called in its place, so that the update goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from aime_fast.config import Config, preset
from aime_fast.errors import UserError
from profiling import fake_cuda
from profiling.machine import describe, write_json
from profiling.steps import FakeUpdates


@dataclasses.dataclass
class Cost:
    """Of compiling: graphs (forward and backward are two), their operators, Triton kernels, processor seconds."""

    compilations: int = 0
    graphs: int = 0
    nodes: int = 0
    kernels: int = 0
    tracing: float = 0.0
    lowering: float = 0.0
    triton: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


class Watch:
    """Adds up what regions cost while it is `watching`; `costs` has them by name, in the order of their first compilation."""

    def __init__(self):
        self.costs: dict[str, Cost] = defaultdict(Cost)
        self._name, self._now, self._began = "", Cost(), 0.0

    def backend_of(self, name: str) -> Callable:
        """The backend of `torch.compile` for a region: compiles, and returns the traced operators."""
        from torch._inductor.compile_fx import compile_fx

        def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
            self._name = name
            compile_fx(graph, inputs, inner_compile=self._lower)
            return graph.forward

        return backend

    def _lower(self, graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        began, triton = _processor_seconds(), self._now.triton
        lowered = compile_fx_inner(graph, inputs, **options)
        spent = _processor_seconds() - began - (self._now.triton - triton)
        self._now += Cost(graphs=1, nodes=len(graph.graph.nodes), lowering=spent)
        return lowered

    def _start(self, _: Any) -> None:
        self._name, self._now, self._began = "", Cost(compilations=1), _processor_seconds()

    def _end(self, _: Any) -> None:
        spent = _processor_seconds() - self._began - self._now.lowering - self._now.triton
        self.costs[self._name] += self._now + Cost(tracing=spent)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, what is compiled is counted."""
        from torch._dynamo.callback import callback_handler
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        precompile = CachingAutotuner.precompile

        def timed(kernel: CachingAutotuner, *arguments: Any, **options: Any) -> None:
            began = _processor_seconds()
            precompile(kernel, *arguments, **options)
            self._now += Cost(kernels=1, triton=_processor_seconds() - began)

        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        try:
            with mock.patch.object(CachingAutotuner, "precompile", timed):
                yield
        finally:
            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)


def _processor_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    return time.process_time() + sum(os.times()[2:4])


def measure(config: Config) -> dict[str, Cost]:
    """What the regions of an update cost, by name. The guard of `fake_cuda` must be loaded."""
    inductor = {"compile_threads": 1, "force_disable_caches": True, "shape_padding": False, "joint_graph_constant_folding": False}
    watch = Watch()
    with (
        fake_cuda.present(),
        torch._inductor.config.patch(inductor),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        watch.watching(),
    ):
        updates = FakeUpdates(config, "cuda")
        updates.made = updates.cycle - 1  # the discriminators learn too
        updates.step.model.compile_regions(watch.backend_of)
        updates(contextlib.nullcontext())
        if config.data.stills:
            updates.learn_pictures()
    return dict(watch.costs)


def measure_apart(tier: str) -> dict[str, Cost]:
    """`measure` in a process of its own, in which the guard is there before PyTorch. Raises UserError where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "costs.json"
        try:
            guard = fake_cuda.build(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"--compile-seconds: g++ does not compile what stands for CUDA ({error}); install g++") from None
        caches = {name: str(Path(folder) / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        environment = os.environ | caches | {"LD_PRELOAD": str(guard)}
        command = [sys.executable, "-m", "profiling.compile_seconds", tier, str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not result.is_file():
            raise UserError(f"--compile-seconds, tier {tier}: {done.stderr.strip()[-2000:] or f'exit status {done.returncode}'}")
        return {name: Cost(**cost) for name, cost in json.loads(result.read_text()).items()}


def table(tier: str, costs: dict[str, Cost]) -> str:
    """A line for each region, and their sum."""
    names = [field.name for field in dataclasses.fields(Cost)]
    lines = [f"tier {tier}", f"  {'':<26}{''.join(f'{name:>13}' for name in names)}"]
    for name, cost in (costs | {"sum": sum(costs.values(), Cost())}).items():
        cells = (f"{value:13.1f}" if isinstance(value, float) else f"{value:13d}" for value in dataclasses.astuple(cost))
        lines.append(f"  {name:<26}{''.join(cells)}")
    return "\n".join(lines)


def report(tiers: Sequence[str], file: str | None) -> None:
    """Measures and prints one tier after the other; each is written to `file` as it comes, where other tiers stay."""
    found = json.loads(Path(file).read_text()) if file and Path(file).is_file() else {}
    if "tiers" in found:
        raise UserError(f"--json {file}: it has the counts of profiling.roofline; name another file for --compile-seconds")
    for tier in tiers:
        head, costs = describe("cpu"), measure_apart(tier)
        print(table(tier, costs), flush=True)
        found[tier] = head | {"regions": {name: dataclasses.asdict(cost) for name, cost in costs.items()}}
        if file:
            write_json(file, found)


def main(tier: str, result: str) -> None:
    """What `measure_apart` starts."""
    os.environ.pop("LD_PRELOAD", None)
    costs = {name: dataclasses.asdict(cost) for name, cost in measure(preset(tier)).items()}
    Path(result).write_text(json.dumps(costs))
    os._exit(0)  # the threads of autograd's engine for the device would not end


if __name__ == "__main__":
    main(*sys.argv[1:])
