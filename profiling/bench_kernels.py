"""How fast are the kernels, against eager PyTorch, torch.compile and the best public peer, and against what the machine can do?

Each time is a median with its 20th and 80th percentile. On CUDA, `triton.testing.do_bench` empties the L2 cache before each run; where
launches are what costs, a captured graph of many runs is timed as well (`graph`), as a training step would replay it. Bytes and operations
are counted from the algorithm's inputs and outputs, each read or written once for each pass that is needed, so GB/s and TFLOP/s compare
providers that may move far more. The share is that of a copy, or of a bf16 matrix product, measured in this process.

The kernels are checked first (`profiling.check`). A kernel that fails has its times printed and no speed-up, and the exit status is 1.
On a CPU the kernels have no times: the interpreter's would mean nothing. There eager PyTorch is measured against torch.compile and peers.
Peers are optional: pip install vector-quantize-pytorch torchjd.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from kernels import backend, kumaraswamy, rgb, vq
from kernels.rgb.direct import rgb_direct
from profiling import check
from profiling.cases import REGISTRY
from profiling.machine import describe, title, write_json

Call = Callable[[], Any]
SEED = 2026


@dataclasses.dataclass(frozen=True)
class Target:
    """What a kernel is to reach on an H200; None where nothing is asked."""

    most_us: float | None = None
    over_eager: float | None = None
    over_compile: float | None = None
    share: float | None = None  # of the ceiling
    launches: int | None = None
    graph: bool = False  # judge the time in a captured graph: launches are what costs


@dataclasses.dataclass(frozen=True)
class Workload:
    """One operation at one size. Providers are made when they are measured and freed before the next one."""

    name: str
    gates: tuple[str, ...]  # kernels whose check must pass
    size: str
    dtype: str
    bytes: int
    operations: int
    ceiling: str  # "copy" or "matmul": the part of the machine that bounds it
    providers: dict[str, Callable[[], Call]]
    target: Target = Target()

    @property
    def title(self) -> str:
        return f"{self.name}, {self.size}, {self.dtype}"


class Unavailable(Exception):
    """A peer that is not installed."""


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(SEED)


def _compile(function: Callable, fullgraph: bool = True) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=fullgraph, dynamic=False)


def _vq_workloads(device: torch.device, rows: int, dtype: torch.dtype, targets: bool) -> Iterator[Workload]:
    """Assignment, codebook update, and both as a training step has them. 4 heads of width 64 share 1024 codes."""
    heads, width, codes = 4, 64, 1024
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    name, item = str(dtype).removeprefix("torch."), dtype.itemsize
    vectors = rows * heads

    @functools.lru_cache(maxsize=1)
    def data() -> dict[str, Tensor]:
        g = _generator(device)
        codebook = torch.randn(1, codes, width, generator=g, device=device)
        return {
            "x": torch.randn(rows, heads, width, generator=g, device=device).to(dtype),
            "codebook": codebook,
            "codes": torch.randint(codes, (rows, heads), generator=g, device=device),
            "cluster_size": 3 + torch.rand(1, codes, generator=g, device=device),
            "embedding_sum": 3 * codebook,
            "candidates_u": torch.rand(1, codes, generator=g, device=device),
        }

    def assign(function: Callable) -> Call:
        d = data()
        return lambda: function(d["x"], d["codebook"], precision)

    def update(function: Callable) -> Call:
        d = data()
        return lambda: function(d["x"], d["codes"], *(d[n] for n in ("codebook", "cluster_size", "embedding_sum", "candidates_u")))

    def both(quantize: Callable, learn: Callable) -> Callable:
        def step(x, codebook, cluster_size, embedding_sum, candidates_u):
            quantized, codes, commitment = quantize(x, codebook, precision)
            return quantized, commitment, learn(x, codes, codebook, cluster_size, embedding_sum, candidates_u)

        return step

    def train(step: Callable) -> Call:
        d = data()
        return lambda: step(*(d[n] for n in ("x", "codebook", "cluster_size", "embedding_sum", "candidates_u")))

    def peer(training: bool) -> Call:
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise Unavailable(str(error)) from error
        module = VectorQuantize(
            dim=heads * width, codebook_dim=width, codebook_size=codes, heads=heads, separate_codebook_per_head=False, decay=0.99,
            threshold_ema_dead_code=2 if training else 0, commitment_weight=1.0, rotation_trick=False,
        )  # fmt: skip
        module = module.to(device).train(training)
        x = data()["x"].float().reshape(1, rows, heads * width)  # it works in float32
        return lambda: module(x)

    reference, learn = vq.vector_quantize_reference, vq.codebook_update_reference
    state = codes * (width + 1) * 4  # one pass over the moving averages
    read, written = vectors * width * item, vectors * width * item
    labels = vectors * 8
    size = f"{vectors:,} head-vectors of {width}, {codes} codes"
    assign_bytes = read + written + labels + codes * width * 4
    update_bytes = read + labels + 5 * state
    products = 2 * vectors * codes * width
    yield Workload(
        "VQ assign", ("vq_assign",), size, name, assign_bytes, products, "matmul",
        {
            "kernel": lambda: assign(vq.vector_quantize),
            "eager": lambda: assign(reference),
            "compile": lambda: assign(_compile(reference)),
            "vector-quantize-pytorch": lambda: peer(training=False),
        },
        (Target(most_us=100, over_eager=20, over_compile=5) if precision == "bf16" else Target(most_us=400)) if targets else Target(),
    )  # fmt: skip
    yield Workload(
        "VQ update", ("vq_update",), size, name, update_bytes, vectors * width, "copy",
        {"kernel": lambda: update(vq.codebook_update), "eager": lambda: update(learn), "compile": lambda: update(_compile(learn))},
        Target(most_us=150) if targets else Target(),
    )  # fmt: skip
    yield Workload(
        "VQ assign + update", ("vq_assign", "vq_update"), size, name, assign_bytes + update_bytes, products, "matmul",
        {
            "kernel": lambda: train(both(vq.vector_quantize, vq.codebook_update)),
            "eager": lambda: train(both(reference, learn)),
            "compile": lambda: train(_compile(both(reference, learn))),
            "vector-quantize-pytorch": lambda: peer(training=True),
        },
    )  # fmt: skip


def _sticks_workloads(device: torch.device, rows: int, sticks: int, with_kl: bool, target: Target) -> Iterator[Workload]:
    """Forward and, with a KL, backward; noise from a seed on the device."""

    @functools.lru_cache(maxsize=1)
    def data() -> dict[str, Tensor]:
        g = _generator(device)
        found = {
            name: (2 * torch.rand(rows, sticks, generator=g, device=device) - 1).requires_grad_(with_kl) for name in ("log_a", "log_b")
        }
        if with_kl:
            found["alpha"] = (1 + torch.rand(rows, 1, generator=g, device=device)).requires_grad_()
            found["log_alpha"] = torch.randn(rows, 1, generator=g, device=device).requires_grad_()
        found["seed"] = torch.randint(2**62, (1,), generator=g, device=device)
        found["noise"] = torch.rand(rows, sticks, generator=g, device=device)
        return found

    def forward(function: Callable, noise: str) -> Call:
        d = data()
        return lambda: function(
            d["log_a"].detach(), d["log_b"].detach(), d[noise], *(d[n].detach() for n in ("alpha", "log_alpha") if n in d)
        )

    def backward(function: Callable, noise: str) -> Call:
        d = data()
        leaves = [d[name] for name in ("log_a", "log_b", "alpha", "log_alpha")]
        outputs = function(leaves[0], leaves[1], d[noise], *leaves[2:])
        used = [outputs.log_pi, outputs.pi, outputs.kl]
        cotangents = [torch.ones_like(x) for x in used]
        return lambda: torch.autograd.grad(used, leaves, cotangents, retain_graph=True)

    def peer() -> Call:
        d = data()

        def sample() -> tuple[Tensor, ...]:
            distribution = torch.distributions.Kumaraswamy(d["log_a"].detach().exp(), d["log_b"].detach().exp(), validate_args=False)
            v = distribution.rsample()
            rest = torch.nn.functional.pad((1 - v).cumprod(-1), (1, 0), value=1.0)
            pi = torch.nn.functional.pad(v, (0, 1), value=1.0) * rest
            return v, pi, pi.log(), distribution.log_prob(v)

        return sample

    function, reference = kumaraswamy.kumaraswamy_sticks, kumaraswamy.kumaraswamy_sticks_reference
    count, pieces = rows * sticks, rows * (sticks + 1)
    per_row = 8 * rows if with_kl else 0
    forward_bytes = count * (8 + 8 + (4 if with_kl else 0)) + pieces * 8 + per_row
    # The eager references draw nothing: their noise is given, since drawing it by integer arithmetic would only slow them.
    size, name = f"{rows:,} x {sticks}", "sticks + KL" if with_kl else "sticks"
    yield Workload(
        f"{name} forward", ("kumaraswamy",), size, "float32", forward_bytes, 0, "copy",
        {
            "kernel": lambda: forward(function, "seed"),
            "eager": lambda: forward(reference, "noise"),
            "compile": lambda: forward(_compile(reference), "noise"),
            "torch.distributions (no KL)" if with_kl else "torch.distributions": peer,
        },
        target,
    )  # fmt: skip
    if with_kl:
        yield Workload(
            f"{name} backward", ("kumaraswamy",), size, "float32", count * (8 + 4 + 8) + pieces * 8 + 2 * per_row, 0, "copy",
            {
                "kernel": lambda: backward(function, "seed"),
                "eager": lambda: backward(reference, "noise"),
                "compile": lambda: backward(_compile(reference), "noise"),
            },
            target,
        )  # fmt: skip


def _rgb_workloads(device: torch.device, tasks: int, size: int, dtype: torch.dtype, target: Target) -> Iterator[Workload]:
    """One step of RGB with state in place. "eager" is the algorithm on whole vectors, as published."""

    @functools.lru_cache(maxsize=1)
    def data() -> dict[str, Tensor]:
        g = _generator(device)
        rows = torch.randn(tasks, size, generator=g, device=device)
        rows += 0.5 * torch.randn(size, generator=g, device=device)
        direction = torch.nn.functional.normalize(torch.randn(size, generator=g, device=device), dim=0)
        angles, has_direction = torch.zeros(tasks, device=device), torch.ones((), dtype=torch.bool, device=device)
        return {"gradients": rows.to(dtype), "direction": direction, "angles": angles, "has_direction": has_direction}

    def step(choice: str) -> Call:
        d, out = data(), torch.empty(size, device=device)

        def run():
            before = backend.selected_kernels()
            backend.select_kernels(choice)
            try:
                return rgb.rgb_rotate_(d["gradients"], d["direction"], d["angles"], d["has_direction"], out=out)
            finally:
                backend.select_kernels(before)

        return run

    def direct(function: Callable) -> Call:
        d = data()
        return lambda: function(d["gradients"].float(), d["direction"], d["angles"], True)

    def torchjd(name: str) -> Call:
        try:
            from torchjd import aggregation

            aggregator = getattr(aggregation, name)()
        except (ImportError, AttributeError) as error:
            raise Unavailable(str(error)) from error
        matrix = data()["gradients"].float()
        return lambda: aggregator(matrix)

    item = dtype.itemsize
    yield Workload(
        "RGB", ("rgb",), f"{tasks} tasks, {size:,} parameters", str(dtype).removeprefix("torch."),
        size * (2 * (item * tasks + 4) + 8), 2 * size * ((tasks + 1) * (tasks + 2) // 2 + 2 * (tasks + 1)), "copy",
        {
            "kernel": lambda: step("auto"),
            "eager": lambda: direct(rgb_direct),
            **({"compile": lambda: direct(_compile(rgb_direct, fullgraph=False))} if tasks == 4 else {}),  # it branches on norms
            "eager, Gram space": lambda: step("reference"),
            "torchjd PCGrad": lambda: torchjd("PCGrad"),
            "torchjd UPGrad": lambda: torchjd("UPGrad"),
        },
        target,
    )  # fmt: skip


def workloads(kernels: list[str], device: torch.device, quick: bool) -> list[Workload]:
    """All sizes for a device, those with a target first; `quick` keeps the smallest."""
    cuda, f32, bf16 = device.type == "cuda", torch.float32, torch.bfloat16
    made: list[Workload] = []
    if {"vq_assign", "vq_update"} & set(kernels):
        sizes = [(640, bf16), (8192, bf16), (65536, bf16), (65536, f32)] if cuda else [(512, f32), (4096, f32)]
        for rows, dtype in sizes[:1] if quick else sizes:
            made += (work for work in _vq_workloads(device, rows, dtype, rows == 65536) if set(work.gates) <= set(kernels))
    if "kumaraswamy" in kernels:
        made += _sticks_workloads(device, 1600, 15, True, Target(most_us=12, over_eager=20, launches=1, graph=True))
        if not quick:
            made += _sticks_workloads(device, 65536 if cuda else 8192, 15, True, Target())
            made += _sticks_workloads(device, 2**24 // 15 if cuda else 2**16, 15, False, Target(share=0.8) if cuda else Target())
    if "rgb" in kernels:
        sizes = [(4, 2_000_000, f32), (4, 25_000_000, f32), (4, 25_000_000, bf16), (9, 5_000_000, f32)]
        sizes = sizes if cuda else [(4, 200_000, f32), (4, 4_000_000, f32)]
        for tasks, size, dtype in sizes[:1] if quick else sizes:
            # 1.25 times the time of moving the bytes at the speed of a copy is 0.8 of that speed.
            target = Target(share=0.8, over_eager=20) if (size, dtype) == (25_000_000, f32) else Target()
            made += _rgb_workloads(device, tasks, size, dtype, target)
    return sorted(made, key=lambda work: work.target == Target())


def measure(call: Call, device: torch.device) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8]))
    for _ in range(2):
        call()
    times, began = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - began < 0.4 and len(times) < 200):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return _quantiles(times)


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]


def measure_graph(make: Callable[[], Call], runs: int = 20, replays: int = 50) -> float:
    """Median milliseconds of one run among `runs` in a captured graph. Everything is made on the capturing stream: autograd stays on it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(runs):
                call()
        graph.replay()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
        for start, end in marks:
            start.record()
            graph.replay()
            end.record()
        stream.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / runs


def count_launches(call: Call) -> int:
    """Kernels, copies and fills that one run puts on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def ceilings(device: torch.device) -> dict[str, float]:
    """What this machine reaches: {"copy": GB/s read and written, "matmul": TFLOP/s, bf16 on CUDA and float32 on a CPU}."""
    cuda = device.type == "cuda"
    source = torch.zeros(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)[0]
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: left @ right, device)[0]
    return {"copy": 2 * source.numel() / copy / 1e6, "matmul": 2 * size**3 / product / 1e9}


def _row(work: Workload, provider: str, device: torch.device, ceiling: dict[str, float]) -> dict[str, Any]:
    """Measure one provider; what went wrong is in `note`."""
    row = {"kernel": work.name, "size": work.size, "dtype": work.dtype, "provider": provider, "device": title(device)}
    row |= {"bytes": work.bytes, "flops": work.operations, "ceiling": work.ceiling}
    if provider == "kernel" and device.type != "cuda":
        return row | {"note": "not measured: there is no GPU, and the interpreter's times would mean nothing"}
    before = functorch_config.donated_buffer
    functorch_config.donated_buffer = False  # a backward that is timed again and again keeps its buffers
    try:
        make = work.providers[provider]
        call = make()
        median, low, high = measure(call, device)
        row |= {"median_ms": median, "p20_ms": low, "p80_ms": high}
        row |= {"gbps": work.bytes / median / 1e6, "tflops": work.operations / median / 1e9}
        row["share_of_ceiling"] = row["gbps" if work.ceiling == "copy" else "tflops"] / ceiling[work.ceiling]
        if device.type == "cuda":
            row["launches"] = count_launches(call)
            if provider == "kernel" or (work.target.graph and provider in ("eager", "compile")):
                try:
                    row["graph_ms"] = measure_graph(make)
                except RuntimeError as error:
                    row["note"] = f"no graph: {str(error).splitlines()[0]}"
    except Unavailable as error:
        row["note"] = f"not installed: {error}"
    except Exception as error:
        row["note"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
    finally:
        functorch_config.donated_buffer = before
    return row


def compare(rows: list[dict[str, Any]]) -> None:
    """Write into each row of one workload how many times faster it is than the others (`speedup`)."""
    for row in rows:
        others = {other["provider"]: other for other in rows if other is not row and "median_ms" in other}
        if "median_ms" in row:
            row["speedup"] = {name: other["median_ms"] / row["median_ms"] for name, other in others.items()}
            if "graph_ms" in row:
                row["speedup"] |= {f"{n} (graph)": o["graph_ms"] / row["graph_ms"] for n, o in others.items() if "graph_ms" in o}


def verdict(work: Workload, row: dict[str, Any], device: torch.device) -> str | None:
    """How the kernel's row stands to its target; None without one."""
    target = work.target
    if target == Target():
        return None
    if device.type != "cuda" or "H200" not in torch.cuda.get_device_name(device):
        return "not measured: the target is for an H200"
    if "median_ms" not in row:
        return "not measured"
    timed = row.get("graph_ms", math.inf) if target.graph else row["median_ms"]
    speedup = row.get("speedup", {})
    parts = []
    if target.most_us is not None:
        parts.append(
            (1e3 * timed <= target.most_us, f"{1e3 * timed:.1f} us (<= {target.most_us:g}{', in a graph' if target.graph else ''})")
        )
    for name, least in (("eager", target.over_eager), ("compile", target.over_compile)):
        if least is not None and name in speedup:
            parts.append((speedup[name] >= least, f"{speedup[name]:.1f}x {name} (>= {least:g})"))
    if target.share is not None:
        parts.append(
            (row["share_of_ceiling"] >= target.share, f"{row['share_of_ceiling']:.0%} of the {work.ceiling} (>= {target.share:.0%})")
        )
    if target.launches is not None:
        parts.append((row.get("launches") == target.launches, f"{row.get('launches')} launches ({target.launches})"))
    return "; ".join(f"{'met' if met else 'MISSED'} {text}" for met, text in parts)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one workload as text."""
    lines = []
    for row in rows:
        if "median_ms" not in row:
            lines.append(f"  {row['provider']:<28} {row['note']}")
            continue
        shown = (lambda name: "graph" not in name) if row["provider"] == "kernel" else (lambda name: name == "eager")
        speedup = "  ".join(f"{ratio:.2f}x {name}" for name, ratio in row.get("speedup", {}).items() if shown(name))
        graph = f"{row['graph_ms']:9.4f}" if "graph_ms" in row else f"{'':9}"
        lines.append(
            f"  {row['provider']:<28} {row['median_ms']:9.4f} {row['p20_ms']:9.4f} {row['p80_ms']:9.4f} {graph} {row['gbps']:8.1f} "
            f"{row['tflops']:8.2f} {row['share_of_ceiling']:7.1%} {row.get('launches', ''):>8}  {speedup}"
        )
    return "\n".join(lines)


HEADER = f"  {'provider':<28}    median       p20       p80  in graph     GB/s  TFLOP/s   share launches  speed-up over"


def draw(rows: list[dict[str, Any]], path: str, heading: str) -> None:
    """Bars of the medians, one panel for each workload, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "median_ms" in row:
            panels.setdefault(f"{row['kernel']}, {row['dtype']}\n{row['size']}", []).append(row)
    columns = min(3, max(1, len(panels)))
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.2 * columns, 0.6 + 2.1 * lines), squeeze=False, layout="constrained")
    shades = {"kernel": "#c0392b", "eager": "#7f8c8d", "compile": "#2c6fa6"}
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (name, group) in zip(axes.flat, panels.items()):
        medians = [row["median_ms"] for row in group]
        spread = [[row["median_ms"] - row["p20_ms"] for row in group], [row["p80_ms"] - row["median_ms"] for row in group]]
        bars = axis.barh(
            [row["provider"] for row in group], medians, xerr=spread, color=[shades.get(row["provider"], "#b8a04a") for row in group]
        )
        axis.bar_label(bars, [f"{x:.3g} ms" for x in medians], padding=4, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(medians) / 2, max(medians) * 8)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("milliseconds", fontsize=8)
    figure.suptitle(heading, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench kernels`."""
    parser.add_argument("--kernel", choices=tuple(REGISTRY), nargs="+", default=list(REGISTRY), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest size of each, and a shorter check before it")
    parser.add_argument("--json", metavar="FILE", help="write machine, versions, ceilings and rows here")
    parser.add_argument("--seconds", type=float, metavar="N", help="start no workload after this time; those with a target come first")
    parser.add_argument("--picture", metavar="FILE", help="draw the medians (PNG); needs matplotlib")


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Check, measure, print and write; returns the exit status."""
    if options.device == "cuda" and not torch.cuda.is_available():
        usage_error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    device = torch.device(options.device)
    began = time.perf_counter()
    backend.select_kernels("auto")  # whatever AIME_KERNELS says
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the direct form of RGB breaks the graph, as it must
    failed = {}
    for kernel in options.kernel:
        only = (lambda case: case.pinned) if options.quick else (lambda case: True)
        failed[kernel] = check.failures(check.check_kernel(kernel, device, only))
        if failed[kernel]:
            print(f"the check of {kernel} failed:\n{check.table(failed[kernel][:3])}\n")

    ceiling = ceilings(device)
    print(f"{title(device)}: copy {ceiling['copy']:.0f} GB/s, matmul {ceiling['matmul']:.2f} TFLOP/s")
    rows, header = [], describe(device) | {"ceilings": ceiling, "check_failed": [name for name, bad in failed.items() if bad]}
    header["left_out"] = []
    waiting = workloads(options.kernel, device, options.quick)
    while waiting:
        work = waiting.pop(0)  # and its data with it
        if options.seconds is not None and time.perf_counter() - began > options.seconds:
            header["left_out"].append(work.title)
            continue
        measured = [_row(work, provider, device, ceiling) for provider in work.providers]
        broken = [gate for gate in work.gates if failed.get(gate)]
        print(f"\n{work.title}\n{HEADER}")
        if not broken:
            compare(measured)
        print(table(measured))
        if broken:
            print(f"  no speed-up: the check of {', '.join(broken)} failed, and a wrong kernel is not fast")
        else:
            said = {row["provider"]: verdict(work, row, device) for row in measured}.get("kernel")
            if said is not None:
                print(f"  target: {said}")
                next(row for row in measured if row["provider"] == "kernel")["target"] = said
        rows += measured
        if options.json:  # after each workload: what was measured outlives a kill
            write_json(options.json, header | {"rows": rows, "wall_s": round(time.perf_counter() - began, 1)})
    if header["left_out"]:
        print(f"\nleft out after {options.seconds:g} s: {'; '.join(header['left_out'])}")
        if options.json:
            write_json(options.json, header | {"rows": rows, "wall_s": round(time.perf_counter() - began, 1)})
    if options.picture:
        try:
            draw(rows, options.picture, f"{title(device)}, torch {torch.__version__}")
        except ImportError as error:
            print(f"no picture: {error}; pip install matplotlib")
    print(f"\n{len(rows)} rows in {time.perf_counter() - began:.0f} s")
    return int(any(failed.values()))
