"""What compiling costs, by region."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from aime_fast.errors import UserError
from profiling import compile_seconds, fake_cuda, roofline
from profiling.compile_seconds import Cost, Watch


def test_what_is_compiled_is_counted_by_region_and_the_traced_operators_are_called():
    torch._dynamo.reset()
    watch = Watch()
    compiled = torch.compile(lambda x: x @ x, backend=watch.backend_of("a"), dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1), watch.watching():
        for length in (3, 4, 3):  # the second is another shape, the third is not
            x = torch.rand(length, length)  # of products alone Inductor makes no C++, which would take seconds
            assert torch.equal(compiled(x), x @ x)
    torch.compile(lambda x: x.t() @ x, backend=watch.backend_of("b"))(torch.rand(3, 3))  # nobody watches
    (cost,) = watch.costs.values()
    assert list(watch.costs) == ["a"]
    assert (cost.compilations, cost.graphs, cost.kernels, cost.triton) == (2, 2, 0, 0.0)
    assert cost.nodes >= 2 * 3
    assert cost.tracing > 0
    assert cost.lowering > 0


def test_the_report_has_every_region_and_their_sum(tmp_path, monkeypatch, capsys):
    costs = {"recurrence": Cost(1, 2, 30, 4, 1.0, 2.0, 3.0), "mixture prior": Cost(2, 4, 50, 6, 0.5, 0.25, 0.125)}
    monkeypatch.setattr(compile_seconds, "measure_apart", lambda tier: costs)
    roofline.main(["--compile-seconds", "--tier", "debug", "1", "--json", str(tmp_path / "costs.json")])
    assert "sum                                   3            6           80           10          1.5          2.2          3.1" in (
        capsys.readouterr().out
    )
    written = json.loads((tmp_path / "costs.json").read_text())
    assert list(written) == ["debug", "1"]
    assert Cost(**written["1"]["regions"]["recurrence"]) == costs["recurrence"]
    roofline.main(["--compile-seconds", "--tier", "2", "--json", str(tmp_path / "costs.json")])
    assert list(json.loads((tmp_path / "costs.json").read_text())) == ["debug", "1", "2"]  # a tier at a time
    with pytest.raises(SystemExit):
        roofline.main(["--compile-seconds", "--check", "roofline.json"])


def test_a_measurement_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(fake_cuda, "build", lambda folder: folder)
    failed = subprocess.CompletedProcess([], 1, "", "RuntimeError: no such region")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="tier debug: RuntimeError: no such region"):
        compile_seconds.measure_apart("debug")


def test_the_fused_cell_of_a_gpu_has_shapes_without_one():
    """Its shape functions: the gates' two halves [B, 4 Dh] and the cell [B, Dh], and their gradients."""
    gates = [torch.empty(3, 20, device="meta", requires_grad=True) for _ in range(2)]
    cell = torch.empty(3, 5, device="meta", requires_grad=True)
    hidden, after, _ = torch.ops.aten._thnn_fused_lstm_cell(*gates, cell)
    assert hidden.shape == after.shape == cell.shape
    gradients = torch.autograd.grad(hidden.sum() + after.sum(), [*gates, cell])
    assert [g.shape for g in gradients] == [gates[0].shape, gates[1].shape, cell.shape]
