"""Where a training step spends its time: `python -m profiling.trace --tier 1 [--trace-steps N] [--out FILE] [any setting of train]`.

Prints the phases of a step and its largest operators, after warm-up, and with --out writes a trace for chrome://tracing or Perfetto.
The frames are synthetic: the time of a step does not depend on what they show.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from aime_fast.cli import parse_arguments, run_command, tier_from
from aime_fast.config import Config, preset
from aime_fast.data import make_batches
from aime_fast.training.schedules import Every
from aime_fast.training.settings import choose_device, choose_kernels, keep_freed_memory
from aime_fast.training.step import TrainingStep
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

WARM_UP = 3  # steps before the first that counts


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """What to profile."""

    config: Config
    trace_steps: int = 4  # steps that are profiled, and as many that are timed without the profiler
    out: str | None = None  # trace file to write (JSON)


def make_step(config: Config) -> tuple[TrainingStep, list]:
    """A training step and a few batches of the config's shape."""
    device = choose_device(config.run.device)
    choose_kernels(config.run.kernels)
    if device.type == "cpu":
        keep_freed_memory()
    data = dataclasses.replace(config.data, data="synthetic", episodes=4)
    batches, validation = make_batches(data, config.run.seed, device)
    validation.close()
    torch.manual_seed(config.run.seed)
    model = DPGMMVariationalRecurrentAutoencoder.from_config(config, batches.action_dim).to(device)
    step = TrainingStep(model, config)  # before compiling: it copies the model
    if config.run.compile:
        model.compile_regions()
    ready = [next(batches) for _ in range(2 * config.optim.accumulate)]
    batches.close()
    return step, ready


def run_steps(step: TrainingStep, batches: list, count: int) -> list[float]:
    """Seconds of each of `count` updates; the discriminator learns as often as in training."""
    optim, seconds = step.config.optim, []
    one = torch.ones((), device=step.device)
    for i in range(count):
        began = time.perf_counter()
        chosen = [batches[(i + j) % len(batches)] for j in range(optim.accumulate)]
        bool(step(chosen, one, one * optim.learning_rate, Every(optim.n_critic)(i))["finite"])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return seconds


def trace(options: TraceConfig) -> None:
    """Times and profiles a step, and prints both."""
    config = options.config
    step, batches = make_step(config)
    run_steps(step, batches, WARM_UP)
    seconds = sorted(run_steps(step, batches, options.trace_steps))
    with profile() as profiler:
        run_steps(step, batches, options.trace_steps)

    frames = config.data.batch_size * config.data.sequence_length * config.optim.accumulate
    low, middle, high = (1e3 * seconds[i] for i in (0, len(seconds) // 2, -1))
    print(f"tier {config.tier}, {step.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, compile {config.run.compile}")
    print(f"{frames} frames an update, median {middle:.0f} ms ({low:.0f} to {high:.0f}), {1e3 * frames / middle:.0f} frames/s")

    events = profiler.key_averages()
    cuda = ProfilerActivity.CUDA in profiler.activities and step.device.type == "cuda"
    total = (lambda e: e.device_time_total) if cuda else (lambda e: e.cpu_time_total)
    own = (lambda e: e.self_device_time_total) if cuda else (lambda e: e.self_cpu_time_total)
    print("\nphase                          ms an update")
    for event in sorted((e for e in events if e.key.startswith("step: ")), key=total, reverse=True):
        print(f"  {event.key.removeprefix('step: '):<28} {total(event) / 1e3 / options.trace_steps:8.1f}")
    print("\noperator                                            ms an update   calls    share")
    everything = sum(own(e) for e in events)
    for event in sorted((e for e in events if not e.key.startswith("step: ")), key=own, reverse=True)[:15]:
        count = event.count / options.trace_steps
        print(f"  {event.key[:48]:<48} {own(event) / 1e3 / options.trace_steps:12.1f} {count:7.0f} {own(event) / everything:8.1%}")
    if options.out:
        profiler.export_chrome_trace(options.out)
        print(f"\ntrace written to {options.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and trace."""
    default = TraceConfig(preset(tier_from(argv, "1")))
    trace(parse_arguments(TraceConfig, "python -m profiling.trace", "Profile training steps.", argv, default=default))


if __name__ == "__main__":
    run_command(main)
