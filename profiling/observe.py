"""Activity of the GPU in a training step: launches, kernels, host synchronisations, and the share of time in which it is busy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile

from profiling.steps import UPDATE, Updates, synchronize

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize")
FIELDS = ("launches_per_step", "kernels_per_step", "host_syncs_per_step", "gpu_busy")


def observe(updates: Updates, update_seconds: float) -> dict[str, float]:
    """The values of `FIELDS` (see `summarise`), from further updates; `update_seconds` is the time of one without the profiler."""
    count = updates.cycle
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(count):
                updates()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    warned = sum("synchronizing" in str(warning.message) for warning in caught)
    synchronize(updates.device)
    with profile() as profiler:
        for _ in range(count):
            updates()
        synchronize(updates.device)
    summary = summarise(list(profiler.events()), count, update_seconds)
    return summary | {"host_syncs_per_step": max(summary["host_syncs_per_step"], warned / count)}


def summarise(events: Sequence[FunctionEvent], count: int, update_seconds: float) -> dict[str, float]:
    """Per update, from the profile of `count` updates:

    `launches_per_step`: calls inside the step that give the GPU work; `host_syncs_per_step`: calls inside the step that wait for it;
    `kernels_per_step`: kernels, copies and fills that ran on it; `gpu_busy`: the time in which any of them ran, as a share of the update.
    """
    inside = [event.time_range for event in events if event.name == UPDATE and event.device_type == DeviceType.CPU]

    def calls(names: tuple[str, ...]) -> float:
        starts = [event.time_range.start for event in events if event.name.startswith(names) and event.device_type == DeviceType.CPU]
        return sum(any(step.start <= start <= step.end for step in inside) for start in starts) / count

    work = [e.time_range for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    busy, covered = 0.0, 0.0  # microseconds; no kernel is counted twice where two overlap
    for interval in sorted(work, key=lambda interval: interval.start):
        busy += max(0.0, interval.end - max(interval.start, covered))
        covered = max(covered, interval.end)
    return {
        "launches_per_step": calls(LAUNCHES),
        "kernels_per_step": len(work) / count,
        "host_syncs_per_step": calls(WAITS),
        "gpu_busy": min(1.0, busy / 1e6 / count / update_seconds),
    }
