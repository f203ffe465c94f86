"""Operations by range: forward, backward with the forward that they belong to, and all that PyTorch's own counter finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import debug_config
from torch.utils.flop_counter import FlopCounterMode

from aime_fast.config import Config
from aime_fast.runtime.spans import open_spans, span
from profiling.flops import CountByRange, count, main
from profiling.steps import Updates
from profiling.trace import OUTSIDE, Share


def test_backward_counts_where_its_forward_was():
    x, first, second = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
    with open_spans() as names, CountByRange(names) as counter:
        with span("a: one"):
            y = x @ first
            with span("step: update"):  # the range of a whole update names nothing
                y = y.tanh()
        with span("b: two"):
            z = y @ second
        z.sum().backward()
        torch.mm(x.detach(), x.detach())
    product = 2 * 8**3
    both = Share(product, 2 * product)
    assert dict(counter.counts) == {"a: one": both, "b: two": both, OUTSIDE: Share(product, 0)}


def small() -> Config:
    """The debug preset with the fewest layers that leave nothing out."""
    return debug_config(blocks_per_level=0, slot_iterations=1, overshoot_frames=1)


@pytest.fixture(scope="module")
def counts():
    return count(small())


def test_nothing_is_lost_beside_pytorchs_own_counter(counts):
    config = small()
    updates = Updates(dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch=0)))
    with FlopCounterMode(display=False) as theirs:
        for _ in range(updates.cycle):
            updates()
    updates.close()
    ours = sum(share.total for share in counts.values()) * updates.frames * updates.cycle
    assert ours == pytest.approx(theirs.get_total_flops(), rel=1e-9)
    for pillar in ("perceiver_io", "generative_prior", "encoder_decoder", "temporal_dynamics", "attention_schema"):
        parts = [share for name, share in counts.items() if name.startswith(pillar)]
        assert sum(part.forward for part in parts) > 0, pillar
        assert sum(part.backward for part in parts) > 0, pillar


def test_the_command_prints_pillars_and_their_sum(counts, monkeypatch, capsys):
    monkeypatch.setattr("profiling.flops.count", lambda config: counts)
    main(["--tier", "debug"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tier debug"
    rows = {line.split()[0]: [float(x) for x in line.split()[-3:]] for line in lines[2:] if not line.startswith("    ")}
    assert rows["sum"][2] == pytest.approx(rows["sum"][0] + rows["sum"][1], abs=0.02)
    assert rows["encoder_decoder"][2] > 0
