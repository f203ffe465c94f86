"""Time the kernels against eager PyTorch, torch.compile and public peers, and compare with the bandwidth and throughput of the machine.

Each time is a median with its 20th and 80th percentile. On CUDA, `triton.testing.do_bench` empties the L2 cache before each run. Kernels
are also timed in a captured graph of many runs (`graph`), as a training step replays them; targets are judged by that where it can be
captured. GB/s and TFLOP/s count the bytes and operations of the algorithm (`profiling.workloads`), also for providers that move more. The
share of the ceiling is relative to a copy, or to a bf16 matrix product, measured in this process.

The kernels are checked first (`profiling.check`). For a kernel that fails, times are printed without speed-up, and the exit status is 1.
On a CPU the kernels are not timed, since the interpreter's times mean nothing; eager PyTorch is compared with torch.compile and peers.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config

from kernels import backend
from profiling import check
from profiling.cases import REGISTRY
from profiling.machine import describe, title, write_json
from profiling.workloads import Call, Target, Unavailable, Workload, workloads


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
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), fifths[0], fifths[3]


def measure_graph(make: Callable[[], Call], runs: int = 20, replays: int = 50) -> float:
    """Median milliseconds of one run among `runs` in a captured graph. `make` runs on the capturing stream, so autograd stays on it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # autograd has threads of its own
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
    """Number of kernels, copies and fills that one run launches on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured limits of this machine: {"copy": GB/s read and written, "matmul": TFLOP/s, bf16 on CUDA and float32 on a CPU}."""
    cuda = device.type == "cuda"
    source = torch.zeros(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device)[0]
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = measure(lambda: left @ right, device)[0]
    return {"copy": 2 * source.numel() / copy / 1e6, "matmul": 2 * size**3 / product / 1e9}


def _row(work: Workload, provider: str, device: torch.device, ceiling: dict[str, float]) -> dict[str, Any]:
    """Measure one provider; a failure is reported in `note`."""
    row = {"kernel": work.name, "size": work.size, "dtype": work.dtype, "provider": provider, "device": title(device)}
    row |= {"bytes": work.bytes, "flops": work.operations, "ceiling": work.ceiling}
    if provider == "kernel" and device.type != "cuda":
        return row | {"note": "not measured: there is no GPU, and the interpreter's times would mean nothing"}
    before = functorch_config.donated_buffer
    functorch_config.donated_buffer = False  # a backward that runs many times must keep its buffers
    try:
        make = work.providers[provider]
        call = make()
        median, low, high = measure(call, device)
        row |= {"median_ms": median, "p20_ms": low, "p80_ms": high}
        row |= {"gbps": work.bytes / median / 1e6, "tflops": work.operations / median / 1e9}
        row["share_of_ceiling"] = row["gbps" if work.ceiling == "copy" else "tflops"] / ceiling[work.ceiling]
        if device.type == "cuda":
            row["launches"] = count_launches(call)
            del call  # and its graph of autograd, whose leaves belong to the stream of their first use
            if provider == "kernel" or (work.target != Target() and provider in ("eager", "compile")):
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
    """The kernel's row compared with its target; None without one."""
    target = work.target
    if target == Target():
        return None
    if device.type != "cuda" or "H200" not in torch.cuda.get_device_name(device):
        return "not measured: the target is for an H200"
    if "median_ms" not in row:
        return "not measured"
    timed = row.get("graph_ms", row["median_ms"])
    speedup = row.get("speedup", {})
    parts = []
    if target.most_us is not None:
        parts.append(
            (1e3 * timed <= target.most_us, f"{1e3 * timed:.1f} us (<= {target.most_us:g}{', in a graph' if 'graph_ms' in row else ''})")
        )
    for name, least in (("eager", target.over_eager), ("compile", target.over_compile)):
        ratio = speedup.get(f"{name} (graph)", speedup.get(name))
        if least is not None and ratio is not None:
            parts.append((ratio >= least, f"{ratio:.1f}x {name} (>= {least:g})"))
    if target.share is not None:
        share = row["share_of_ceiling"] * row["median_ms"] / timed
        parts.append((share >= target.share, f"{share:.0%} of the {work.ceiling} (>= {target.share:.0%})"))
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
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the direct form of RGB breaks the graph: it branches on norms
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

    def save() -> None:
        if options.json:
            write_json(options.json, header | {"rows": rows, "wall_s": round(time.perf_counter() - began, 1)})

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
            print(f"  no speed-up: the check of {', '.join(broken)} failed")
        else:
            said = {row["provider"]: verdict(work, row, device) for row in measured}.get("kernel")
            if said is not None:
                print(f"  target: {said}")
                next(row for row in measured if row["provider"] == "kernel")["target"] = said
        rows += measured
        save()  # after each workload, so a killed run keeps its measurements
    if header["left_out"]:
        print(f"\nleft out after {options.seconds:g} s: {'; '.join(header['left_out'])}")
        save()
    if options.picture:
        try:
            draw(rows, options.picture, f"{title(device)}, torch {torch.__version__}")
        except ImportError as error:
            print(f"no picture: {error}; pip install matplotlib")
    print(f"\n{len(rows)} rows in {time.perf_counter() - began:.0f} s")
    return int(any(failed.values()))
