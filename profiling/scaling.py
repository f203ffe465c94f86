"""Estimate how far training scales: bytes that an update sends, and its speed on more GPUs. `python -m profiling.scaling`.

An estimate on paper, of measured times of an update on one GPU, of the bytes of its gradients and of the data sheets of links: no run on
several GPUs. Each GPU has the tier's whole batch (weak scaling). A message of S bytes over N GPUs costs 2 (N - 1) / N S / bandwidth, that
of a ring, and 2 log2(N) times the latency. Nothing is taken off for work beside messages, which three of the tasks' four rows have.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from aime_fast.config import preset
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder
from profiling.machine import ROOT
from profiling.steps import FakeUpdates

ACTIONS = {"1": 1, "2": 2, "3": 21}  # of the tiers' tasks
GPUS = (2, 4, 8, 16, 32, 64, 128, 256)
ENOUGH = 0.9  # efficiency


class Link(NamedTuple):
    """Between GPUs: bytes a second in each direction, of data sheets, and seconds of a hop, a usual figure."""

    name: str
    bandwidth: float
    latency: float


LINKS = (
    Link("NVLink 4", 450e9, 5e-6),
    Link("InfiniBand NDR, a port a GPU", 50e9, 10e-6),
    Link("Ethernet, 100 Gb/s for a GPU", 12.5e9, 30e-6),
)


class Sent(NamedTuple):
    """By an update, a mean."""

    large: list[float]  # bytes of the messages of gradients
    small: int  # number of other messages, of a few kB


def rows(tier: str) -> list[float]:
    """Bytes of the parts of the tasks' rows that an update of a tier sends, in fp32: from one on fake tensors, of tier 2 a minute or so."""
    updates, sizes = FakeUpdates(preset(tier)), []
    gather = updates.step._task_rows.gather
    updates.step._task_rows.gather = lambda *given: gather(*given[:4], lambda part: sizes.append(4.0 * part.numel()))
    updates(nullcontext())
    return sizes


def sent(tier: str, small: int) -> Sent:
    """What an update of a tier sends, in fp32."""
    config = preset(tier)
    with torch.device("meta"):
        model = DPGMMVariationalRecurrentAutoencoder.from_config(config, ACTIONS[tier])
    count = lambda parameters: 4 * sum(p.numel() for p in parameters)  # noqa: E731
    towers = count([*model.encoder.parameters(), *model.decoder.parameters()])
    discriminators = count(model.discriminator_parameters()) / config.optim.n_critic
    stills = [towers] * (config.data.stills * config.optim.accumulate)
    codebooks = 3 * count([model.perceiver_io.tokenizer.quantizer.codebook])  # sums, and twice the rows that replace codes
    return Sent([*rows(tier), discriminators, codebooks, *stills], small)


def seconds(sent: Sent, gpus: int, link: Link) -> float:
    """That the messages of an update take."""
    ring = 2 * (gpus - 1) / gpus / link.bandwidth
    return sum(sent.large) * ring + (len(sent.large) + sent.small) * 2 * math.log2(gpus) * link.latency


def fastest_update(tier: str) -> float:
    """Seconds, of the newest measurements on one GPU."""
    rows = json.loads((ROOT / "docs" / "results" / "h200" / f"train-{tier}.json").read_text())
    return 1 / max(row["updates_per_second"]["median"] for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the estimate; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=20, metavar="N", help="small ones of an update; `bench distributed` counts them")
    options = parser.parse_args(argv)
    print(
        f"| tier | update, ms | gradients, MB an update | link | efficiency at {', '.join(map(str, GPUS))} GPUs | below {ENOUGH:.0%} from |"
    )
    print("|---|---|---|---|---|---|")
    for tier in ACTIONS:
        alone, sending = fastest_update(tier), sent(tier, options.messages)
        for link in LINKS:
            shares = [alone / (alone + seconds(sending, gpus, link)) for gpus in GPUS]
            below = next((str(gpus) for gpus, share in zip(GPUS, shares) if share < ENOUGH), f"more than {GPUS[-1]}")
            print(
                f"| {tier} | {1e3 * alone:.1f} | {sum(sending.large) / 1e6:.0f} | {link.name} | "
                f"{', '.join(f'{share:.2f}' for share in shares)} | {below} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
