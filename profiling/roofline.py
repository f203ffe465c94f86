"""What an update must cost on a GPU, counted without one: `python -m profiling.roofline --tier 1 2 3 --gpu h100 h200 a100 [--json FILE]`.

An update of tasks, RGB, discriminators and Adam is called on fake tensors (`steps.FakeUpdates`). Of every operator the counts have the
range it belongs to, bytes read and written, operations, and whether it launches a kernel. A model of fusion then joins what a compiler
with vertical fusion would: elementwise operators and reductions over the same elements, as long as no matrix product, convolution or
other library call lies between. A kernel costs at least its bytes at the memory's rate, its operations at the rate of the matrix units,
or one launch, whichever is most; their sum is a floor of the time, and gives a ceiling of frames/s.

`--compile-seconds` says instead what compiling the regions of `--compile on` and `graph` for a GPU costs (`compile_seconds.py`).

The model is not a compiler: it knows no limit of registers, no horizontal fusion and no cancelled duplicates, and it was not compared with
one yet. Random indexing counts what is picked, not the table. Kernels written in Triton count as their references.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from aime_fast.cli import run_command
from aime_fast.config import PRESETS, Config, preset
from aime_fast.errors import UserError
from aime_fast.runtime.spans import open_spans
from profiling.flops import ByRange
from profiling.machine import describe, write_json
from profiling.steps import FakeUpdates
from profiling.trace import OUTSIDE, PILLARS

aten = torch.ops.aten
LAUNCH = 2e-6  # seconds of a kernel in a captured graph, at least
TOLERANCE = 0.05  # by which counts may differ from those of `--check`
MOST_FUSED = 64  # operators in one kernel


class Gpu(NamedTuple):
    """Peaks of a GPU (SXM, dense), from its data sheet."""

    bytes_per_second: float
    bf16: float  # operations a second of matrix units
    fp32: float  # and of others: TF32 is off in fp32


GPUS = {"h100": Gpu(3.35e12, 989e12, 67e12), "h200": Gpu(4.8e12, 989e12, 67e12), "a100": Gpu(2.04e12, 312e12, 19.5e12)}

NO_KERNEL = {
    aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.lift_fresh,
}  # fmt: skip
FUSED = {
    aten.clone, aten.copy_, aten._to_copy, aten.cat, aten.stack, aten.constant_pad_nd, aten.zeros, aten.zeros_like, aten.new_zeros,
    aten.ones, aten.ones_like, aten.full, aten.full_like, aten.new_full, aten.scalar_tensor, aten.arange, aten.fill_, aten.zero_, aten.rand,
    aten.rand_like, aten.randn, aten.randn_like, aten.exponential_, aten.index_select, aten.gather, aten.index, aten.embedding,
    aten.slice_backward, aten.select_backward, aten.flip, aten.roll, aten.one_hot, aten.tril, aten.repeat_interleave,
}  # fmt: skip
REDUCTIONS = {
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.argmax, aten.argmin, aten.any, aten.all, aten.prod, aten.var,
    aten.var_mean, aten.std, aten.logsumexp, aten.cumsum, aten.cumprod, aten.linalg_vector_norm, aten._softmax,
    aten._softmax_backward_data, aten._log_softmax, aten._log_softmax_backward_data, aten.native_layer_norm,
    aten.native_layer_norm_backward, aten.native_group_norm, aten.native_group_norm_backward, aten.nll_loss_forward, aten.nll_loss_backward,
    aten.mse_loss, aten.mse_loss_backward,
}  # fmt: skip
PICKS = {aten.index_select, aten.gather, aten.index, aten.embedding}  # read as much as they write
SEVERAL = {aten.convolution_backward: 2}  # kernels of one library call


@dataclasses.dataclass
class Kernel:
    """One operator, or several fused."""

    range: str
    half: bool = False  # operations are of bf16
    operations: float = 0.0
    launches: int = 1
    library: bool = False
    level: int = 0  # library calls before it
    counts: set[int] = dataclasses.field(default_factory=set)  # of elements that it loops over
    operators: int = 0
    reads: dict[int, int] = dataclasses.field(default_factory=dict)  # tensor -> bytes
    writes: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())

    def seconds(self, gpu: Gpu) -> float:
        """The least time on a GPU."""
        operations = self.operations / (gpu.bf16 if self.half else gpu.fp32)
        return max(self.bytes / gpu.bytes_per_second, operations, LAUNCH * self.launches)


class Recorder(ByRange):
    """Lists the kernels of the operators called within it, as eager code launches them and as fusion would."""

    def __init__(self, names: list[str]):
        super().__init__(names)
        self.calls = 0
        self.eager: list[Kernel] = []
        self.fused: list[Kernel] = []
        self._owners: dict[int, Kernel] = {}  # who makes a tensor, after fusion
        self._roots: dict[int, int] = {}  # a view's tensor
        self._users: dict[int, list[Kernel]] = defaultdict(list)
        self._alive: list[Any] = []  # ids stay unique

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim":
            inputs, outputs = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
            self._alive += [inputs, outputs]
            self.calls += 1
            self._record(func, inputs, outputs, args, kwargs or {}, out)
        return out

    def _record(self, func, inputs: list[Tensor], outputs: list[Tensor], args, kwargs, out) -> None:
        packet, returns = func._overloadpacket, func._schema.returns
        name, _ = self.range()
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or packet in NO_KERNEL:
            if inputs:
                for view in outputs:
                    self._roots[id(view)] = self._root(inputs[0])
            return
        read = {self._root(x): _size(x) for x in inputs}
        written = {self._root(x): _size(x) for x in outputs}
        if packet in PICKS:
            read = dict.fromkeys(read, 0) | {next(iter(read)): sum(written.values())}
        half = any(x.dtype in (torch.bfloat16, torch.float16) for x in inputs)
        operations = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        kernel = Kernel(name, half, operations, SEVERAL.get(packet, 1), reads=read, writes=written)
        self.eager.append(kernel)
        self._fuse(func, dataclasses.replace(kernel, reads=dict(read), writes=dict(written)), inputs, outputs)

    def _fuse(self, func, kernel: Kernel, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        packet = func._overloadpacket
        reduces = packet in REDUCTIONS
        kernel.library = not (reduces or packet in FUSED or torch.Tag.pointwise in func.tags)
        makers = [self._owners[root] for root in kernel.reads if root in self._owners]
        kernel.level = max((maker.level + maker.library for maker in makers), default=0)
        looped = {max((x.numel() for x in (inputs if reduces else outputs)), default=0)}
        kernel.counts = looped | ({x.numel() for x in outputs} if reduces else set())
        joined = kernel
        if not kernel.library:
            fits = (m for m in makers if not m.library and m.level == kernel.level and looped & m.counts and m.operators < MOST_FUSED)
            joined = max(fits, key=lambda m: m.operators, default=kernel)
        if joined is kernel:
            self.fused.append(kernel)
        else:
            joined.counts |= kernel.counts
            joined.reads |= {root: size for root, size in kernel.reads.items() if root not in joined.writes}
            joined.writes |= kernel.writes
        joined.operators += 1
        for root in kernel.reads:
            self._users[root].append(joined)
        for root in kernel.writes:
            self._owners[root] = joined

    def finish(self) -> None:
        """What only its own kernel reads is never written."""
        for kernel in self.fused:
            users = {root: self._users.get(root, []) for root in kernel.writes}
            kernel.writes = {
                root: size for root, size in kernel.writes.items() if not users[root] or any(user is not kernel for user in users[root])
            }

    def _root(self, x: Tensor) -> int:
        return self._roots.get(id(x), id(x))


def _size(x: Tensor) -> int:
    """Bytes behind a tensor; an expanded axis has one element."""
    elements = 1
    for length, stride in zip(x.shape, x.stride()):
        elements *= length if stride or length == 0 else 1
    return elements * x.element_size()


def count(config: Config) -> dict[str, Any]:
    """Counts of an update in which the discriminators learn: frames, precision, `calls` (operators), and for `eager` and `fused`
    {launches, gigabytes, gigaflops, by_range: {range: the same three}, seconds: {GPU: least time}}."""
    run = dataclasses.replace(config.run, device="cpu", compile="off", kernels="reference")
    updates = FakeUpdates(dataclasses.replace(config, run=run))
    updates.made = updates.cycle - 1
    with open_spans() as names:
        recorder = Recorder(names)
        updates(recorder)
    recorder.finish()
    found = {"frames": updates.frames, "precision": config.run.precision, "calls": recorder.calls}
    return found | {"eager": _sums(recorder.eager), "fused": _sums(recorder.fused)}


def _sums(kernels: Sequence[Kernel]) -> dict[str, Any]:
    by_range: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_range[kernel.range].append(kernel)
    seconds = {name: sum(kernel.seconds(gpu) for kernel in kernels) for name, gpu in GPUS.items()}
    return _three(kernels) | {"seconds": seconds, "by_range": {name: _three(part) for name, part in sorted(by_range.items())}}


def _three(kernels: Iterable[Kernel]) -> dict[str, float]:
    kernels = list(kernels)
    return {
        "launches": sum(kernel.launches for kernel in kernels),
        "gigabytes": sum(kernel.bytes for kernel in kernels) / 1e9,
        "gigaflops": sum(kernel.operations for kernel in kernels) / 1e9,
    }


def table(tier: str, counts: dict[str, Any], gpus: Sequence[str]) -> str:
    """Launches, bytes and operations by pillar, and the ceilings."""

    def line(label: str, rows: Sequence[dict[str, float]]) -> str:
        cells = (f"{row['launches']:9.0f} {row['gigabytes']:9.3f}" for row in rows)
        return f"  {label:<24} {'  '.join(cells)}  {rows[0]['gigaflops']:11.2f}"

    ways, unit = ("eager", "fused"), "GB"
    lines = [
        f"tier {tier}, {counts['precision']}, {counts['frames']} frames, {counts['calls']} operators",
        f"  {'':<24} {'  '.join(f'{way:>9} {unit:>9}' for way in ways)}  {'GFLOP':>11}",
    ]
    for pillar in (*PILLARS, "step", OUTSIDE):
        parts = [[part for name, part in counts[way]["by_range"].items() if name.split(": ")[0] == pillar] for way in ways]
        if any(parts):
            lines.append(
                line(
                    pillar, [{key: sum(part[key] for part in of_way) for key in ("launches", "gigabytes", "gigaflops")} for of_way in parts]
                )
            )
    lines.append(line("sum", [counts[way] for way in ways]))
    for gpu in gpus:
        floors = {way: counts[way]["seconds"][gpu] for way in ways}
        cells = ", ".join(f"{way} {1e3 * s:.1f} ms, at most {counts['frames'] / s:,.0f} frames/s" for way, s in floors.items())
        lines.append(f"  {gpu}: {cells}")
    return "\n".join(lines)


def changed(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What launches and bytes differ by more than TOLERANCE."""
    found = []
    for way in ("eager", "fused"):
        for key in ("launches", "gigabytes", "gigaflops"):
            new, old = now[way][key], before[way][key]
            if abs(new - old) > TOLERANCE * old:
                found.append(f"{way} {key} {old:.6g} -> {new:.6g}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options, count, print the tables. Raises UserError where counts are not those of --check."""
    parser = argparse.ArgumentParser("python -m profiling.roofline", description="Count an update and say what it must cost on a GPU.")
    parser.add_argument("--tier", nargs="+", choices=tuple(PRESETS), default=["1", "2", "3"], help="default: 1 2 3")
    parser.add_argument("--gpu", nargs="+", choices=tuple(GPUS), default=list(GPUS), help="default: all")
    parser.add_argument("--json", metavar="FILE", help="file to write")
    parser.add_argument("--compile-seconds", action="store_true", help="instead: processor seconds of compiling the regions for an H100")
    parser.add_argument("--check", metavar="FILE", help=f"compare with a file of --json: launches and bytes within {TOLERANCE:.0%}")
    options = parser.parse_args(argv)
    if options.compile_seconds:
        from profiling import compile_seconds  # it tells PyTorch shapes of operators of a GPU

        if options.check:
            parser.error("--check compares counts, and --compile-seconds makes none")
        return compile_seconds.report(options.tier, options.json)
    if options.check and not Path(options.check).is_file():
        raise UserError(f"--check {options.check}: no such file; write one with --json")
    before = json.loads(Path(options.check).read_text())["tiers"] if options.check else {}
    tiers, differing = {}, []
    for tier in options.tier:
        tiers[tier] = count(preset(tier))
        print(table(tier, tiers[tier], options.gpu), flush=True)
        if tier in before:
            differing += [f"tier {tier}: {words}" for words in changed(tiers[tier], before[tier])]
    if options.json:
        write_json(options.json, describe("cpu") | {"gpus": {name: gpu._asdict() for name, gpu in GPUS.items()}, "tiers": tiers})
    if differing:
        raise UserError(f"--check {options.check}: {'; '.join(differing)}; where that is meant, write the file anew with --json")


if __name__ == "__main__":
    run_command(main)
