"""Where a training step spends its time: `python -m profiling.trace --tier 1 [--trace-steps N] [--out FILE] [any setting of train]`.

After warm-up, prints the time of a step by pillar, forward and backward, and by operator. With --out, writes a trace for chrome://tracing
or Perfetto. The frames are synthetic: the time of a step does not depend on what they show. With --nvtx, runs the steps with NVTX ranges
instead and prints the command that records them with Nsight Systems.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile, record_function

from aime_fast.cli import parse_arguments, run_command, tier_from
from aime_fast.config import Config, preset
from aime_fast.errors import ConfigError
from aime_fast.runtime.machine import choose_compile, choose_device
from aime_fast.runtime.provenance import command_line
from aime_fast.runtime.spans import use_nvtx
from profiling.machine import title
from profiling.steps import Updates, synchronize

PROFILED = "profiled steps"
OUTSIDE = "outside any range"
UNLINKED = "kernels of no operator (graph replays)"
IDLE = "no kernel running"
PILLARS = (
    "perceiver_io", "generative_prior", "encoder_decoder", "temporal_dynamics", "attention_schema", "multi_task_learning",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """What to profile."""

    config: Config
    trace_steps: int = 4  # steps to profile; as many are timed without the profiler
    out: str | None = None  # trace file to write (JSON)
    nvtx: bool = False  # name the ranges for Nsight Systems instead, and print the command that records them


@dataclasses.dataclass
class Share:
    """What the operators in a range cost, and their backward: microseconds here, operations in `profiling.flops`."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


def by_range(events: Sequence[FunctionEvent], cuda: bool = False) -> dict[str, Share]:
    """Profiled time by the innermost range (`a: b`) around each operator; a backward node counts with the operator that created it.

    Args:
        events: of `profiler.events()`, recorded inside one range called `PROFILED`.
        cuda: count the time of kernels on the GPU instead of that of operators on the CPU.

    Returns:
        Shares that add up to the duration of `PROFILED`. `OUTSIDE` is the time in no range. On CUDA `UNLINKED` are kernels that no
        operator launched; `IDLE` is the duration less the times of all kernels (negative if kernels overlap).
    """
    # An operator records the number that the next autograd node gets: of all with the same number, the last one created the node.
    makers: dict[tuple[int, int], FunctionEvent] = {}
    for event in events:
        if event.sequence_nr >= 0 and event.scope == 0 and not _is_node(event):
            key = event.thread, event.sequence_nr
            if key not in makers or event.time_range.start >= makers[key].time_range.start:
                makers[key] = event

    located: dict[int, tuple[str, bool]] = {}

    def locate(event: FunctionEvent | None) -> tuple[str, bool]:
        """(range of the event, whether the event is in its backward)."""
        if event is None:
            return OUTSIDE, False
        if id(event) not in located:
            maker = makers.get((event.fwd_thread, event.sequence_nr)) if _is_node(event) else None
            if maker is not None and (name := locate(maker)[0]) != OUTSIDE:
                located[id(event)] = name, True
            elif event.is_user_annotation and ": " in event.name:
                located[id(event)] = event.name, False
            else:
                located[id(event)] = locate(event.cpu_parent)
        return located[id(event)]

    whole = next(event for event in events if event.name == PROFILED and event.device_type == DeviceType.CPU)
    shares: dict[str, Share] = {}
    for event in events:
        microseconds = _kernel_time(event) if cuda else event.self_cpu_time_total if event.thread == whole.thread else 0.0
        if event.device_type != DeviceType.CPU or event.is_async or not microseconds:
            continue
        if not cuda and not (whole.time_range.start <= event.time_range.start <= whole.time_range.end):
            continue
        name, backward = locate(event)
        share = shares.setdefault(name, Share())
        if backward:
            share.backward += microseconds
        else:
            share.forward += microseconds
    if cuda:
        kernels = sum(e.time_range.elapsed_us() for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
        shares[UNLINKED] = Share(kernels - sum(share.total for share in shares.values()))
        shares[IDLE] = Share(whole.time_range.elapsed_us() - kernels)
    return shares


def _is_node(event: FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _kernel_time(event: FunctionEvent) -> float:
    """Microseconds of the kernels that the operator launched itself. A range also lists its own copy on the GPU, which is no kernel."""
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)


def by_pillar(shares: dict[str, Share]) -> Iterator[tuple[str, dict[str, Share]]]:
    """The pillars that have any, then what lies outside of all, each with its ranges by their names within it, the largest first."""
    largest_first = sorted(shares.items(), key=lambda item: -item[1].total)
    for pillar in PILLARS:
        if parts := {name.removeprefix(f"{pillar}: "): share for name, share in largest_first if name.startswith(f"{pillar}: ")}:
            yield pillar, parts
    if outside := {name: share for name, share in largest_first if name.split(": ")[0] not in PILLARS}:
        yield "outside any pillar", outside


def pillar_table(shares: dict[str, Share], steps: int) -> str:
    """Shares as text, milliseconds an update: the pillars by part, then the time outside any pillar, then the sum."""
    total = sum(share.total for share in shares.values())

    def line(name: str, *parts: Share) -> str:
        share = Share(sum(part.forward for part in parts), sum(part.backward for part in parts))
        each = [value / 1e3 / steps for value in (share.forward, share.backward, share.total)]
        return f"  {name:<42} {each[0]:9.2f} {each[1]:9.2f} {each[2]:9.2f} {share.total / total:8.1%}"

    lines = [f"{'pillar, ms an update':<44} {'forward':>9} {'backward':>9} {'both':>9} {'share':>8}"]
    for pillar, parts in by_pillar(shares):
        lines.append(line(pillar, *parts.values()))
        lines += [line(f"  {name}", share) for name, share in parts.items()]
    return "\n".join([*lines, line("sum", *shares.values())])


def timed(updates: Updates, count: int) -> list[float]:
    """Seconds of each of `count` updates, including the wait for the device."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        updates()
        synchronize(updates.device)
        seconds.append(time.perf_counter() - began)
    return seconds


def trace(options: TraceConfig) -> None:
    """Time and profile a step, and print both. Raises ConfigError if this machine cannot run it."""
    config, steps = options.config, options.trace_steps
    if steps < 1:
        raise ConfigError(f"--trace-steps {steps}: expected at least 1")
    device = choose_device(config.run.device)
    compile = choose_compile(config.run.compile, device)
    if options.nvtx and device.type != "cuda":
        raise ConfigError("--nvtx: Nsight Systems records CUDA programs, and this run is on the CPU; leave --nvtx out")
    updates = Updates(config)
    try:
        timed(updates, updates.warm_up)
        seconds = sorted(timed(updates, steps))
        low, middle, high = (1e3 * seconds[i] for i in (0, len(seconds) // 2, -1))
        frames = updates.frames
        print(f"tier {config.tier}, {title(device)}, torch {torch.__version__}, compile {compile}")
        print(f"{frames} frames an update, median {middle:.1f} ms ({low:.1f} to {high:.1f}), {1e3 * frames / middle:.0f} frames/s")
        if options.nvtx:
            run_for_nsight(updates, steps)
        else:
            run_profiled(updates, steps, compile, options.out)
    finally:
        updates.close()


def run_profiled(updates: Updates, steps: int, compile: str, out: str | None) -> None:
    """Profile `steps` updates with torch.profiler and print the tables."""
    cuda = updates.device.type == "cuda"
    with profile() as profiler, record_function(PROFILED):
        for _ in range(steps):
            updates()
        synchronize(updates.device)
    events = list(profiler.events())
    shares = by_range(events, cuda)
    whole = sum(share.total for share in shares.values()) / 1e3 / steps
    print(f"an update took {whole:.1f} ms under the profiler; below is the time of {'kernels on the GPU' if cuda else 'operators'}\n")
    print(pillar_table(shares, steps))
    if compile != "off":
        print("Compiled regions have no ranges inside: their time counts with the range around them. For all pillars: --compile off.")
    print("\n" + operator_table(events, cuda, steps))
    if out:
        profiler.export_chrome_trace(out)
        print(f"\ntrace written to {out}")


def run_for_nsight(updates: Updates, steps: int) -> None:
    """Run `steps` updates with NVTX ranges for Nsight Systems, and without torch.profiler: only one program at a time can use CUPTI."""
    use_nvtx(True)
    try:
        torch.cuda.profiler.start()
        for _ in range(steps):
            updates()
        synchronize(updates.device)
        torch.cuda.profiler.stop()
    finally:
        use_nvtx(False)
    print(
        f"\n{steps} updates ran with NVTX ranges. To record them:\n  nsys profile --trace=cuda,nvtx,cublas,cudnn --cuda-graph-trace=node "
        f"--capture-range=cudaProfilerApi --capture-range-end=stop --output=aime-tier{updates.config.tier} {command_line()}\n"
        "The tables by pillar and operator come without --nvtx: torch.profiler and Nsight cannot record at the same time."
    )


def operator_table(events: Sequence[FunctionEvent], cuda: bool, steps: int, rows: int = 15) -> str:
    """The operators with the most time of their own as text, milliseconds an update."""
    own: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU and not event.is_async and not event.is_user_annotation:
            own[event.name] += _kernel_time(event) if cuda else event.self_cpu_time_total
            calls[event.name] += 1
    everything = sum(own.values())
    lines = [f"{'operator':<50} {'ms an update':>12} {'calls':>7} {'share':>8}"]
    for name, microseconds in own.most_common(rows):
        share = microseconds / everything if everything else 0.0
        lines.append(f"  {name[:48]:<48} {microseconds / 1e3 / steps:12.2f} {calls[name] / steps:7.0f} {share:8.1%}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and trace."""
    default = TraceConfig(preset(tier_from(argv, "1")))
    trace(parse_arguments(TraceConfig, "python -m profiling.trace", "Profile training steps.", argv, default=default))


if __name__ == "__main__":
    run_command(main)
