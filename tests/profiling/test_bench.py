"""Benchmarks of step, loader and collection, and the trace of a step: the commands as a user types them, at the debug tier."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from models import debug_config
from torch.autograd import DeviceType
from torch.profiler import profile, record_function

from aime_fast.data import EpisodeWriter
from aime_fast.runtime.spans import span, use_nvtx
from profiling import bench, bench_train, observe, trace
from profiling.steps import Updates

FIELDS = {
    "tier", "device", "compile", "precision", "kernels", "frames_per_second", "updates_per_second", "compile_seconds", "inductor_cache",
    "peak_memory_bytes", "launches_per_step", "host_syncs_per_step", "gpu_busy", "model_flops_per_step", "model_flops_utilisation",
    "matmul_flops", "data_wait_seconds", "steps", "frames_per_step", "machine", "versions", "git_commit", "command",
}  # fmt: skip


def in_order(speed: dict[str, float]) -> bool:
    return 0 < speed["p20"] <= speed["median"] <= speed["p80"] < math.inf


def test_train_writes_complete_rows_and_leaves_out_modes_that_a_cpu_lacks(tmp_path, capsys):
    file = tmp_path / "train.json"
    arguments = ["train", "--device", "cpu", "--tier", "debug", "--compile", "off", "capture", "--sample", "0.1", "--json", str(file)]
    assert bench.main(arguments) == 0
    assert "left out: tier debug, compile capture" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())
    assert row.keys() >= FIELDS
    assert (row["tier"], row["device"], row["compile"], row["precision"]) == ("debug", "cpu", "off", "fp32")
    assert in_order(row["frames_per_second"])
    assert in_order(row["updates_per_second"])
    assert row["frames_per_second"]["median"] == pytest.approx(row["frames_per_step"] * row["updates_per_second"]["median"])
    assert row["model_flops_utilisation"] == pytest.approx(
        row["model_flops_per_step"] * row["updates_per_second"]["median"] / row["matmul_flops"]
    )
    assert row["launches_per_step"] is row["gpu_busy"] is row["compile_seconds"] is None


def test_imagined_steps_of_ours_and_of_torchrl(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # takes half a minute
    file = tmp_path / "imagine.json"
    assert bench.main(["imagine", "--tier", "debug", "--starts", "2", "--horizon", "2", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["model"] for row in rows] == ["ours", "ours compiled", "torchrl RSSM"] * 2
    assert [row["gradient"] for row in rows] == [False] * 3 + [True] * 3
    assert all(in_order(row["imagined_steps_per_second"]) for row in rows)


def test_a_configuration_that_fails_does_not_end_the_bench(monkeypatch, tmp_path, capsys):
    class Failing(bench_train.Measured):
        def __init__(self, setting, device):
            if setting.compile == "on":
                raise torch.OutOfMemoryError("no memory for this")
            super().__init__(setting, device)

    monkeypatch.setattr(bench_train, "Measured", Failing)
    file = tmp_path / "train.json"
    assert bench.main(["train", "--device", "cpu", "--quick", "--sample", "0.1", "--json", str(file)]) == 1
    assert "FAILED: tier debug, compile on, fp32, auto kernels: out of memory: no memory for this" in capsys.readouterr().out
    assert [row["compile"] for row in json.loads(file.read_text())] == ["off"]


def test_each_rung_of_the_ladder_changes_one_thing():
    rungs = [dict(zip(("compile", "precision", "kernels"), rung)) for rung in bench_train.LADDER]
    assert [sum(a[name] != b[name] for name in a) for a, b in itertools.pairwise(rungs)] == [1] * 5


def test_loader_with_and_without_prefetch(tmp_path):
    file = tmp_path / "data.json"
    assert bench.main(["data", "--device", "cpu", "--tier", "debug", "--sample", "0.1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["prefetch"] for row in rows] == [0, debug_config().data.prefetch]
    assert all(in_order(row["frames_per_second"]) and row["git_commit"] for row in rows)


def test_collection(tmp_path):
    file = tmp_path / "collect.json"
    assert bench.main(["collect", "--tier", "debug", "--episodes", "1", "--repeats", "2", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert in_order(row["frames_per_second"])
    assert row["frames"] > 100


def test_conversion_and_codecs(tmp_path, capsys):
    attributes = dict(domain="d", task="t", frame_skip=1, image_size=16, render_quality="full", action_dim=2)
    with EpisodeWriter(tmp_path / "a.h5", attributes) as writer:
        for seed in range(2):
            pixels = np.random.default_rng(seed).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
            numbers = {name: np.zeros(30, np.float32) for name in ("reward", "discount")}
            writer.write({"pixels": pixels, "action": np.zeros((30, 2), np.float32), "is_init": np.arange(30) == 0, **numbers})
    common = ["--data", str(tmp_path / "a.h5"), "--json", str(tmp_path / "rows.json"), "--folder", str(tmp_path)]
    assert bench.main(["convert", "--frames", "100", "--workers", "1", *common]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["workers"], row["frames"]) == (1, 116)  # four episodes, each but for its last frame
    assert row["largest_mib"] > 50
    assert bench.main(["codecs", *common]) == 0
    rows = {row["codec"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["none"]["bytes_per_frame"] >= 16 * 16 * 3
    assert all(min(row[name] for name in row if name.endswith("_per_second")) > 0 for row in rows.values())
    with pytest.raises(SystemExit):
        bench.main(["codecs", "--data", str(tmp_path / "none.h5")])
    assert "there is no such file" in capsys.readouterr().err


def test_time_by_pillar_adds_up_and_finds_the_backward():
    a, b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with profile() as profiler, record_function(trace.PROFILED):
        with span("encoder_decoder: a"):
            y = a(x).tanh()
        with span("perceiver_io: b"):
            z = b(y.detach()).exp().sum()
        y = y.sum()  # outside any range
        for _ in range(2):
            torch.autograd.grad(y, list(a.parameters()), retain_graph=True)
    events = profiler.events()
    shares = trace.by_range(events)
    whole = next(event for event in events if event.name == trace.PROFILED).time_range.elapsed_us()
    assert sum(share.total for share in shares.values()) == pytest.approx(whole)
    tanh = sum(event.cpu_time_total for event in events if event.name.endswith("evaluate_function: TanhBackward0"))
    assert shares["encoder_decoder: a"].backward > tanh > 0
    assert shares["encoder_decoder: a"].forward > 0 < shares["perceiver_io: b"].forward
    assert shares["perceiver_io: b"].backward == 0, "its backward was not run"
    assert z.requires_grad


def test_trace_prints_every_pillar(tmp_path, capsys):
    trace.main(["--tier", "debug", "--device", "cpu", "--trace-steps", "2", "--out", str(tmp_path / "trace.json")])
    printed = capsys.readouterr().out
    table = printed[printed.index("pillar, ms") : printed.index("operator ")].splitlines()[1:]
    rows = {row[:42].strip(): [float(word.rstrip("%")) for word in row[42:].split()] for row in table if row}
    pillars = [name for name in trace.PILLARS if name in rows]
    assert len(pillars) >= 5
    assert all(rows[name][0] > 0 < rows[name][1] for name in pillars if name != "multi_task_learning"), rows
    for column in range(3):
        assert sum(rows[name][column] for name in (*pillars, "outside any pillar")) == pytest.approx(rows["sum"][column], abs=0.05)
    assert rows["outside any pillar"][2] < 0.9 * rows["sum"][2]
    assert "encoder_decoder: encoder" in (tmp_path / "trace.json").read_text()


def test_spans_break_no_graph_and_name_eager_operators():
    def double_and_add(x):
        with span("encoder_decoder: double"):
            x = x * 2
        with span("encoder_decoder: add"):
            return x + 1

    graphs, x = [], torch.ones(3)
    torch._dynamo.reset()
    with profile() as profiler:
        compiled = torch.compile(double_and_add, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)(x)
    assert len(graphs) == 1
    assert not any("encoder_decoder" in event.name for event in profiler.events())
    with profile() as profiler:
        assert torch.equal(double_and_add(x), compiled)
    inside = {event.name: event.cpu_parent.name for event in profiler.events() if event.cpu_parent}
    assert (inside["aten::mul"], inside["aten::add"]) == ("encoder_decoder: double", "encoder_decoder: add")


def test_nvtx_asks_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="need a CUDA device"):
        use_nvtx(True)


@dataclasses.dataclass
class Event:
    """The fields of a profiler event that `summarise` reads."""

    name: str
    device_type: DeviceType
    start: float
    end: float
    is_user_annotation: bool = False

    @property
    def time_range(self):
        return self


def test_launches_waits_and_busy_time_are_counted_inside_the_step():
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    events = [
        Event(observe.UPDATE, cpu, 0, 50, True),
        Event("cudaLaunchKernel", cpu, 10, 11),
        Event("cudaGraphLaunch", cpu, 20, 21),
        Event("cudaStreamSynchronize", cpu, 30, 31),
        Event("cudaDeviceSynchronize", cpu, 60, 99),  # after the step
        Event("first", cuda, 10, 30),
        Event("overlaps", cuda, 20, 40),
        Event("later", cuda, 60, 70),
        Event(observe.UPDATE, cuda, 0, 100, True),  # the copy of the range on the GPU
    ]
    summary = observe.summarise(events, count=1, update_seconds=100e-6)
    assert summary == {"launches_per_step": 2, "kernels_per_step": 3, "host_syncs_per_step": 1, "gpu_busy": pytest.approx(0.4)}


@pytest.mark.cuda
def test_train_on_cuda_measures_the_gpu(tmp_path):
    file = tmp_path / "train.json"
    assert bench.main(["train", "--device", "cuda", "--quick", "--compile", "off", "--json", str(file)]) == 0
    for row in json.loads(file.read_text()):
        assert row["launches_per_step"] > 100
        assert row["host_syncs_per_step"] == 0
        assert 0 < row["gpu_busy"] <= 1
        assert row["peak_memory_bytes"] > 0


@pytest.mark.cuda
def test_time_by_pillar_on_cuda_adds_up():
    config = debug_config()
    updates = Updates(dataclasses.replace(config, run=dataclasses.replace(config.run, device="cuda")))
    updates()
    with profile() as profiler, record_function(trace.PROFILED):
        updates()
        torch.cuda.synchronize()
    updates.close()
    shares = trace.by_range(list(profiler.events()), cuda=True)
    kernels = sum(share.total for name, share in shares.items() if name != trace.IDLE)
    assert shares["encoder_decoder: decoder"].forward > 0 < shares["encoder_decoder: decoder"].backward
    assert abs(shares[trace.UNLINKED].total) < 0.1 * kernels
