"""Measure the speed of a training step, and what limits it.

One row a configuration: tier, compile mode, precision and kernels. Frames come from the real loader (synthetic episodes), and no step
waits for the device, as in training. A sample of the speed is one cycle of updates with and without discriminators; median, 20th and 80th
percentile are over the samples. Warm-up, in which the step compiles, is excluded; `compile_seconds` is how much longer it took than as
many later updates. On a CPU the configurations of one tier and precision take turns, because the machine's speed drifts.

On CUDA the default is a ladder, in which each rung adds one thing: eager fp32 with the reference kernels, captured as a CUDA graph,
Triton kernels, TF32, bf16, compiled regions. Operations are those of matrix products and convolutions (and, on CUDA, attention), counted
by PyTorch over eager updates with the reference kernels and compared with the measured rate of a matrix product of the same precision.
`gpu_busy` is the profiled time in which a kernel ran, as a share of the time of an update without the profiler. A value that the device
cannot provide is null.
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from aime_fast.config import PRESETS, preset
from aime_fast.errors import ConfigError
from aime_fast.runtime.machine import WAYS
from kernels.backend import CHOICES
from profiling.ceilings import matmul_rates
from profiling.machine import describe, title
from profiling.rows import write_rows
from profiling.steps import Updates
from profiling.throughput import PRECISIONS, Measured, Setting, clear, sample

LADDER = (
    ("off", "fp32", "reference"),
    ("capture", "fp32", "reference"),
    ("capture", "fp32", "triton"),
    ("capture", "tf32", "triton"),
    ("capture", "bf16", "triton"),
    ("graph", "bf16", "triton"),
)


def count_flops(tier: str, device: torch.device) -> tuple[int | None, int]:
    """(FLOPs of an update, failures): the mean over a cycle of eager updates with the reference kernels and 0, or None and 1."""
    clear(device)
    updates = None
    try:
        updates = Updates(Setting(tier, "off", "fp32", "reference").config(str(device)))
        with FlopCounterMode(display=False) as counter:
            for _ in range(updates.cycle):
                updates()
        return counter.get_total_flops() // updates.cycle, 0
    except Exception as error:
        return None, _report(f"tier {tier}, counting operations", error)
    finally:
        if updates is not None:
            updates.close()


def settings(options: argparse.Namespace) -> list[Setting]:
    """The configurations to measure, in order."""
    chosen = []
    for tier in options.tier:
        precisions = options.precision or (PRECISIONS if options.ladder else [preset(tier).run.precision])
        if options.ladder:
            chosen += [Setting(tier, *rung) for rung in LADDER if rung[0] in options.compile and rung[1] in precisions]
        else:
            chosen += [Setting(tier, mode, precision, options.kernels) for precision in precisions for mode in options.compile]
    return chosen


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `profiling.bench train`."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--tier", choices=tuple(PRESETS), nargs="+", help="default: 1 2 3 on CUDA, debug 1 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", choices=tuple(WAYS), nargs="+", help="default: off capture graph on CUDA, off on on a CPU")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", help="default: all in the ladder, else that of the tier")
    parser.add_argument("--kernels", choices=CHOICES, default="auto", help="kernels to use without the ladder; default auto")
    parser.add_argument(
        "--ladder",
        action=argparse.BooleanOptionalAction,
        help="add one thing a rung; --compile and --precision leave out rungs; default on CUDA",
    )
    parser.add_argument("--sample", type=float, metavar="N", help="seconds of updates a row; default 10 on CUDA, 20 on a CPU")
    parser.add_argument("--seconds", type=float, metavar="N", help="start no configuration after this time")
    parser.add_argument("--quick", action="store_true", help="the debug tier alone, one second a row")
    parser.add_argument("--json", metavar="FILE", help="write the rows here, each with machine, versions, commit and command")


def _set_defaults(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> None:
    """Set the defaults that depend on the device, in place."""
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        usage_error("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    if "tf32" in (options.precision or ()) and not cuda:
        usage_error("--precision tf32: only a GPU has TF32; use fp32 or bf16")
    if options.ladder and not cuda:
        usage_error("--ladder: its rungs need CUDA; leave it out, or use --device cuda")
    options.ladder = cuda if options.ladder is None else options.ladder
    options.tier = ["debug"] if options.quick else options.tier or (["1", "2", "3"] if cuda else ["debug", "1"])
    options.compile = options.compile or (["off", "capture", "graph"] if cuda else ["off", "on"])
    options.sample = options.sample or (1.0 if options.quick else 10.0 if cuda else 20.0)


def bench(options: argparse.Namespace, usage_error: Callable[[str], Any]) -> int:
    """Measure, print and write; returns the exit status."""
    _set_defaults(options, usage_error)
    device, began = torch.device(options.device), time.perf_counter()
    rates = matmul_rates(device)
    print(f"{title(device)}, torch {torch.__version__}: matmul {', '.join(f'{n} {r / 1e12:.2f} TFLOP/s' for n, r in rates.items())}")
    head, rows, failed = describe(device), [], 0
    chosen = [setting for setting in settings(options) if _possible(setting, device)]
    for tier, of_tier in itertools.groupby(chosen, key=lambda setting: setting.tier):
        print(f"\ntier {tier}\n{HEADER}", flush=True)
        flops, failures = count_flops(tier, device)
        failed += failures
        first = None
        for group in _groups(list(of_tier), device):
            if options.seconds is not None and time.perf_counter() - began > options.seconds:
                print(f"  left out after {options.seconds:g} s: {'; '.join(setting.title for setting in group)}")
                continue
            measured, failures = measure_together(group, device, options.sample, flops, rates)
            failed += failures
            for row in measured:
                first = first or row
                row["speedup"] = row["frames_per_second"]["median"] / first["frames_per_second"]["median"]
                rows.append(row)
                print(line(row), flush=True)
            write_rows(options.json, head, rows)  # after each group, so that a kill loses no finished row
    write_rows(options.json, head, rows)
    print(f"\n{len(rows)} rows in {time.perf_counter() - began:.0f} s, {failed} failed")
    return int(failed > 0)


def measure_together(
    group: Sequence[Setting], device: torch.device, seconds: float, flops: int | None, rates: dict[str, float]
) -> tuple[list[dict[str, Any]], int]:
    """(rows, failures) of configurations that take turns for about `seconds` each; `rates` are FLOP/s by precision."""
    clear(device)
    measured: list[Measured] = []
    rows, failed = [], 0
    try:
        for setting in group:
            try:
                measured.append(Measured(setting, str(device)))
            except Exception as error:
                failed += _report(setting.title, error)
        sample(measured, seconds)
        for configuration in measured:
            rows.append(configuration.row(flops, rates[configuration.setting.precision]))
    except Exception as error:
        failed += _report("; ".join(configuration.setting.title for configuration in measured), error)
    finally:
        for configuration in measured:
            configuration.close()
    return rows, failed


def _possible(setting: Setting, device: torch.device) -> bool:
    """Whether this device has the compile mode; prints a line if not."""
    if WAYS[setting.compile].captured and device.type != "cuda":
        print(f"left out: {setting.title}: CUDA graphs need a CUDA device")
        return False
    return True


def _groups(of_tier: list[Setting], device: torch.device) -> Iterator[list[Setting]]:
    """Configurations that take turns: those of one precision on a CPU; on CUDA each is alone and has all the memory."""
    if device.type == "cuda":
        yield from ([setting] for setting in of_tier)
    else:
        yield from (list(group) for _, group in itertools.groupby(of_tier, key=lambda setting: setting.precision))


def _report(what: str, error: Exception) -> int:
    """Print the failure; returns 1, to add to the number of failures."""
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    print(f"  FAILED: {what}: {kind}: {(str(error).strip().splitlines() or [''])[0][:200]}", flush=True)
    if not isinstance(error, (ConfigError, torch.OutOfMemoryError)):
        traceback.print_exception(error)
    return 1


HEADER = (
    f"  {'compile':<8}{'precision':<10}{'kernels':<10} frames/s     p20     p80 speed-up"
    "  compile s  cache  GiB  launches  syncs   busy    MFU  data ms"
)


def line(row: dict[str, Any]) -> str:
    """A row as text, with the columns of `HEADER`."""

    def show(value: float | None, form: str) -> str:
        width = int(form.split(".")[0])
        return format(value, form) if value is not None else f"{'-':>{width}}"

    speed = row["frames_per_second"]
    memory = None if row["peak_memory_bytes"] is None else row["peak_memory_bytes"] / 2**30
    return (
        f"  {row['compile']:<8}{row['precision']:<10}{row['kernels']:<10}{speed['median']:9.1f}{speed['p20']:8.1f}{speed['p80']:8.1f}"
        f"{row['speedup']:8.2f}x{show(row['compile_seconds'], '11.1f')}  {row['inductor_cache'] or '-':<5}{show(memory, '5.1f')}"
        f"{show(row['launches_per_step'], '10.0f')}{show(row['host_syncs_per_step'], '7.1f')}{show(row['gpu_busy'], '7.1%')}"
        f"{show(row['model_flops_utilisation'], '7.1%')}{1e3 * row['data_wait_seconds']:9.2f}"
    )
