"""Kernels, bytes and operations counted on fake tensors, and the model of fusion."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils.flop_counter import FlopCounterMode

from aime_fast.config import preset
from aime_fast.errors import UserError
from aime_fast.runtime.spans import open_spans, span
from profiling.roofline import GPUS, LAUNCH, Recorder, changed, count, main, table
from profiling.steps import FakeUpdates, Updates

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "roofline.json"


def record(function, *inputs):
    with open_spans() as names, Recorder(names) as recorder, span("a: b"):
        function(*inputs)
    recorder.finish()
    return recorder


def test_a_chain_of_elementwise_operators_and_its_sum_are_one_kernel_that_writes_what_is_read_elsewhere():
    x = torch.ones(1000)
    recorder = record(lambda x: ((x * 2).relu() + 1).sum(), x)
    assert len(recorder.eager) == 4
    (kernel,) = recorder.fused
    assert (kernel.range, kernel.bytes, kernel.operations) == ("a: b", 4000 + 4, 0)
    assert sum(k.bytes for k in recorder.eager) == 3 * 8000 + 4004


def test_a_matrix_product_ends_a_kernel_and_counts_its_operations():
    x, w = torch.ones(8, 16), torch.ones(16, 4)
    recorder = record(lambda: ((x + 1) @ w).relu().exp())
    assert [k.library for k in recorder.fused] == [False, True, False]
    assert [k.bytes for k in recorder.fused] == [2 * 512, 512 + 256 + 128, 2 * 128]
    assert [k.operations for k in recorder.fused] == [0, 2 * 8 * 16 * 4, 0]


def test_a_kernel_does_not_wait_for_what_waits_for_it():
    """exp of x may not be fused with what reads both it and the product made from it."""
    x = torch.ones(16, 16)

    def function():
        early = x.exp()
        return early + early @ x

    assert len(record(function).fused) == 3


def test_a_normalisation_is_one_kernel_and_views_and_broadcasts_cost_nothing():
    x = torch.ones(8, 32)

    def normalise():
        centred = x.view(8, 32) - x.mean(1, keepdim=True).expand(8, 32)
        return centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt()

    recorder = record(normalise)
    assert len(recorder.fused) == 1
    assert recorder.fused[0].bytes == 2 * 1024


def test_picked_rows_count_and_not_the_table():
    table, index = torch.ones(1000, 8), torch.zeros(4, dtype=torch.int64)
    assert record(lambda: table.index_select(0, index)).eager[0].bytes == 2 * 4 * 8 * 4


def test_a_kernel_costs_the_most_of_bytes_operations_and_launch():
    gpu = GPUS["h100"]
    small, large, product = (
        max(kernel.seconds(gpu) for kernel in record(function).fused)
        for function in (
            lambda: torch.ones(8) + 1,
            lambda: torch.ones(1 << 24).clone() + 1,
            lambda: torch.ones(2048, 2048) @ torch.ones(2048, 2048),
        )
    )
    assert small == LAUNCH
    assert large == pytest.approx(2 * 4 * (1 << 24) / gpu.bytes_per_second, rel=0.6)  # read, and written once or twice
    assert product == pytest.approx(2 * 2048**3 / gpu.fp32)


@pytest.fixture(scope="module")
def debug_counts():
    return count(preset("debug"))


def test_an_update_reads_nothing_back_and_has_the_operations_of_pytorchs_own_counter(debug_counts):
    config = preset("debug")
    updates = Updates(dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch=0)))
    updates.made = updates.cycle - 1  # the discriminators learn too
    with FlopCounterMode(display=False) as theirs:
        updates()
    updates.close()
    for way in ("eager", "fused"):
        assert debug_counts[way]["gigaflops"] == pytest.approx(theirs.get_total_flops() / 1e9, rel=1e-9)
        assert sum(part["launches"] for part in debug_counts[way]["by_range"].values()) == debug_counts[way]["launches"]
    assert debug_counts["fused"]["launches"] < debug_counts["eager"]["launches"] <= debug_counts["calls"]
    assert debug_counts["fused"]["gigabytes"] < debug_counts["eager"]["gigabytes"]


def test_counts_are_those_of_the_committed_file(debug_counts):
    """Where a change of the step is meant: `python -m profiling.roofline --tier debug 1 2 3 --json docs/results/roofline.json`."""
    assert changed(debug_counts, json.loads(COMMITTED.read_text())["tiers"]["debug"]) == []


def test_a_change_is_told_and_the_table_has_every_pillar(debug_counts):
    more = json.loads(json.dumps(debug_counts))
    more["fused"]["launches"] *= 1.1
    (told,) = changed(more, debug_counts)
    assert told.startswith("fused launches")
    shown = table("debug", debug_counts, ["h100"])
    assert all(name in shown for name in ("perceiver_io", "attention_schema", "sum", "h100: eager"))


def test_a_host_read_in_the_step_fails_and_a_picture_step_has_none():
    updates = FakeUpdates(preset("debug"))
    assert "gradient_norm/perception" in updates.learn_pictures()
    observe = updates.step._observe

    def reads(pixels):
        pixels.float().sum().item()
        return observe(pixels)

    updates.step._observe = reads
    with open_spans() as names, pytest.raises(DataDependentOutputException):
        updates(Recorder(names))


def test_counts_that_have_changed_end_the_command(tmp_path, debug_counts, monkeypatch, capsys):
    monkeypatch.setattr("profiling.roofline.count", lambda config: debug_counts)
    main(["--tier", "debug", "--json", str(tmp_path / "now.json")])
    main(["--tier", "debug", "--check", str(tmp_path / "now.json")])
    found = json.loads((tmp_path / "now.json").read_text())
    found["tiers"]["debug"]["eager"]["launches"] *= 2
    (tmp_path / "before.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"tier debug: eager launches .* --json"):
        main(["--tier", "debug", "--check", str(tmp_path / "before.json")])
    with pytest.raises(UserError, match="no such file"):
        main(["--tier", "debug", "--check", str(tmp_path / "none.json")])


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--gpu", "abacus"])
    assert "abacus" in capsys.readouterr().err
