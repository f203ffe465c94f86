"""What the GPU did in a training step: launches, kernels, waits of the host, and the share of time in which it was busy."""

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
    """Launches, waits and the busy share of the GPU, from a few more updates."""
    count = 2 * updates.cycle
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
    found = observed(list(profiler.events()), count, update_seconds)
    return found | {"host_syncs_per_step": max(found["host_syncs_per_step"], warned / count)}


def observed(events: Sequence[FunctionEvent], count: int, update_seconds: float) -> dict[str, float]:
    """Per update, from the profile of `count` updates:

    `launches_per_step` calls that put work on the GPU, `kernels_per_step` kernels, copies and fills that ran there,
    `host_syncs_per_step` calls that waited for it, both kinds of calls inside the step alone; `gpu_busy` share of `update_seconds`.
    """
    inside = [event.time_range for event in events if event.name == UPDATE and event.device_type == DeviceType.CPU]

    def calls(names: tuple[str, ...]) -> float:
        made = [event.time_range.start for event in events if event.name.startswith(names) and event.device_type == DeviceType.CPU]
        return sum(any(step.start <= start <= step.end for step in inside) for start in made) / count

    work = [e.time_range for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    busy, reached = 0.0, 0.0
    for interval in sorted(work, key=lambda interval: interval.start):
        busy += max(0.0, interval.end - max(interval.start, reached))
        reached = max(reached, interval.end)
    return {
        "launches_per_step": calls(LAUNCHES),
        "kernels_per_step": len(work) / count,
        "host_syncs_per_step": calls(WAITS),
        "gpu_busy": min(1.0, busy / 1e6 / count / update_seconds),
    }
