"""Measure the speed of a training step in one configuration, or in several that take turns."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters

from aime_fast.config import Config, preset
from kernels.backend import kernels_on
from profiling.observe import FIELDS, observe
from profiling.rows import spread
from profiling.steps import Updates, synchronize

PRECISIONS = ("fp32", "tf32", "bf16")  # tf32: fp32 with `--tf32 on`
TURN = 2  # cycles of updates in a turn
TURNS = 3  # of each configuration, at least


@dataclasses.dataclass(frozen=True)
class Setting:
    """The configuration of one row."""

    tier: str
    compile: str
    precision: str
    kernels: str

    @property
    def title(self) -> str:
        return f"tier {self.tier}, compile {self.compile}, {self.precision}, {self.kernels} kernels"

    def config(self, device: str) -> Config:
        base = preset(self.tier)
        precision, tf32 = ("fp32", "on") if self.precision == "tf32" else (self.precision, "auto")
        run = dataclasses.replace(base.run, device=device, compile=self.compile, precision=precision, tf32=tf32, kernels=self.kernels)
        return dataclasses.replace(base, run=run)


class Measured:
    """A warmed-up configuration and its samples so far. Raises ConfigError as `Updates` does."""

    def __init__(self, setting: Setting, device: str):
        self.setting = setting
        cache_before = _cache_counters()
        self.updates = Updates(setting.config(device))
        self.device, self.kernels = self.updates.device, kernels_on(self.updates.device)
        try:
            began = time.perf_counter()
            for _ in range(self.updates.warm_up):
                self.updates()
            synchronize(self.device)
            self.warm_up_seconds = time.perf_counter() - began
        except BaseException:
            self.close()
            raise
        self.inductor_cache = _cache_state(cache_before, _cache_counters()) if setting.compile != "off" else None
        self.samples: list[float] = []  # seconds of a cycle
        self.waited, self.counted = 0.0, 0

    def take(self) -> None:
        """Add the samples of a turn. On CUDA the device records the times, and the host waits only at the end."""
        before, made = self.updates.waited, self.updates.made
        if self.device.type == "cuda":  # so that the queue is not empty at the first stamp
            self.updates()
        stamps = [_stamp(self.device)]
        for _ in range(TURN):
            for _ in range(self.updates.cycle):
                self.updates()
            stamps.append(_stamp(self.device))
        synchronize(self.device)
        self.samples += [_between(a, b) for a, b in itertools.pairwise(stamps)]
        self.waited += self.updates.waited - before
        self.counted += self.updates.made - made

    @property
    def update_seconds(self) -> float:
        """Median time of an update, in seconds."""
        return statistics.median(self.samples) / self.updates.cycle

    def row(self, flops: int | None, matmul: float | None) -> dict[str, Any]:
        """The row of these samples; `flops` of an update, `matmul` FLOP/s. On a CPU the values that need CUDA are None."""
        rates = [self.updates.cycle / seconds for seconds in self.samples]
        per_second = statistics.median(rates)
        steady = self.updates.warm_up * self.update_seconds
        cuda = self.device.type == "cuda"
        row = {
            **dataclasses.asdict(self.setting),
            "device": self.device.type,
            "kernels": self.kernels,
            "frames_per_second": spread([self.updates.frames * rate for rate in rates]),
            "updates_per_second": spread(rates),
            "compile_seconds": max(0.0, self.warm_up_seconds - steady) if self.setting.compile != "off" else None,
            "inductor_cache": self.inductor_cache,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
            "data_wait_seconds": self.waited / self.counted,
            "steps": self.counted,
            "frames_per_step": self.updates.frames,
            "model_flops_per_step": flops,
            "matmul_flops": matmul,
            "model_flops_utilisation": flops * per_second / matmul if flops and matmul else None,
        }
        return row | (observe(self.updates, self.update_seconds) if cuda else dict.fromkeys(FIELDS))

    def close(self) -> None:
        """Stop the loader."""
        self.updates.close()


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def _cache_counters() -> tuple[int, int]:
    inductor = counters["inductor"]
    return inductor["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"], inductor["fxgraph_cache_miss"]


def _cache_state(before: tuple[int, int], after: tuple[int, int]) -> str | None:
    """What Inductor found in its cache on disk: "warm" all, "cold" nothing, "mixed" a part; None if it was not used."""
    hits, misses = after[0] - before[0], after[1] - before[1]
    return {(True, False): "warm", (False, True): "cold", (True, True): "mixed"}.get((hits > 0, misses > 0))


def sample(measured: Sequence[Measured], seconds: float) -> None:
    """Take samples in turns: about `seconds` for each configuration, and at least `TURNS` turns."""
    began, turns = time.perf_counter(), 0
    while measured and (turns < TURNS or time.perf_counter() - began < seconds * len(measured)):
        for configuration in measured:
            configuration.take()
        turns += 1


def clear(device: torch.device) -> None:
    """Free earlier weights, graphs and compiled code, and reset the peak of device memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
