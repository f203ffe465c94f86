"""Operations of a training step: `python -m profiling.flops --tier 1 [--json FILE] [any setting of train]`.

Counts the matrix products, convolutions and attention of `n_critic` updates, as PyTorch's operators are called with their shapes, and
prints MFLOP a frame by pillar, forward and backward; a multiplication and an addition are two. Tensors are fake: nothing is computed, so
the machine does not matter.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from aime_fast.cli import parse_arguments, run_command, tier_from
from aime_fast.config import Config, preset
from aime_fast.runtime.spans import open_spans
from profiling.machine import describe, write_json
from profiling.steps import FakeUpdates
from profiling.trace import OUTSIDE, Share, by_pillar

PER_UPDATE = ("step: RGB", "step: Adam", "step: EMA")  # ranges of which an update has one, however many batches it accumulates


@dataclasses.dataclass(frozen=True)
class FlopsConfig:
    """What to count."""

    config: Config
    json: str | None = None  # file to write


class ByRange(TorchDispatchMode):
    """Knows the innermost range `a: b` around each operator; one of a backward pass belongs to the range of its forward.

    Args: names: of the ranges that are open at the moment, see `open_spans`.
    """

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names
        self._makers: dict[int, str] = {}  # by the number of an autograd node: autograd has just made it when it calls the operator

    def range(self) -> tuple[str, bool]:
        """The range of the operator that was just called, and whether it is of a backward pass. To be asked once of every operator."""
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._makers.get(node._sequence_nr(), OUTSIDE), True
        name = next((name for name in reversed(self.names) if ": " in name and not name.startswith("step: update")), OUTSIDE)
        self._makers.setdefault(torch.autograd._get_sequence_nr() - 1, name)
        return name, False


class CountByRange(ByRange):
    """Adds up operations by range."""

    def __init__(self, names: list[str]):
        super().__init__(names)
        self.counts: dict[str, Share] = defaultdict(Share)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, backward = self.range()
        packet = func._overloadpacket
        if packet in flop_registry:
            operations, share = flop_registry[packet](*args, **(kwargs or {}), out_val=out), self.counts[name]
            if backward:
                share.backward += operations
            else:
                share.forward += operations
        return out


def count(config: Config) -> dict[str, Share]:
    """Operations a frame by range, mean over a cycle of updates."""
    run = dataclasses.replace(config.run, device="cpu", compile="off", kernels="reference", precision="fp32")  # bf16 counts the same
    updates = FakeUpdates(dataclasses.replace(config, run=run))
    with open_spans() as names:
        counter = CountByRange(names)
        for _ in range(updates.cycle):
            updates(counter)
    cycle = updates.cycle * updates.frames
    frames = {name: cycle * (config.optim.accumulate if name in PER_UPDATE else 1) for name in counter.counts}
    return {name: Share(s.forward / frames[name], s.backward / frames[name]) for name, s in counter.counts.items() if s.total}


def table(counts: dict[str, Share]) -> str:
    """MFLOP a frame: pillars, their parts, what lies outside, the sum."""

    def line(name: str, *parts: Share) -> str:
        forward, backward = (sum(getattr(part, way) for part in parts) / 1e6 for way in ("forward", "backward"))
        return f"  {name:<42} {forward:9.2f} {backward:9.2f} {forward + backward:9.2f}"

    lines = [f"{'MFLOP a frame':<44} {'forward':>9} {'backward':>9} {'both':>9}"]
    for pillar, parts in by_pillar(counts):
        lines.append(line(pillar, *parts.values()))
        lines += [line(f"  {name}", part) for name, part in parts.items()]
    return "\n".join([*lines, line("sum", *counts.values())])


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options, count, print the table."""
    default = FlopsConfig(preset(tier_from(argv, "1")))
    options = parse_arguments(FlopsConfig, "python -m profiling.flops", "Count the operations of an update.", argv, default=default)
    counts = count(options.config)
    print(f"tier {options.config.tier}\n{table(counts)}")
    if options.json:
        write_json(
            options.json,
            describe("cpu") | {"tier": options.config.tier, "flop_a_frame": {n: [s.forward, s.backward] for n, s in counts.items()}},
        )


if __name__ == "__main__":
    run_command(main)
