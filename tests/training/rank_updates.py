"""Updates of every kind from the same start, in float64, by each of the processes that a launcher started: what `test_ranks.py` compares.

Called as `rank_updates.py FOLDER [fp32|bf16]`: rank r writes what it has come to as `r.pt` in the folder. With the second argument all is
in fp32, and gradients are sent as it says.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from aime_fast.config import Config, preset
from aime_fast.data import make_batches
from aime_fast.evaluation.validation import validate
from aime_fast.runtime import ranks
from aime_fast.training import TrainingStep
from aime_fast.training.arena import GradientRows
from aime_fast.training.latent_phase import LatentPhase, LatentReplay
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder


def config() -> Config:
    base = preset("debug")
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, data="synthetic", augment=True, prefetch=0, stills=2, batch_size=8, sequence_length=5),
        model=dataclasses.replace(base.model, decoded_share=0.5, auxiliary_share=0.25, attention_dropout=0.3, token_corruption=0.2),
        optim=dataclasses.replace(base.optim, latent_phase_batch_size=8, latent_phase_frames=4),
    )


def in_order(update: Callable[[], object]) -> list[str]:
    """What an update does with its gradients: "make" a row, "send" it, "wait" for all that were sent."""
    done, named = [], {"make": (GradientRows, "_differentiate"), "send": (ranks.Averages, "begin"), "wait": (ranks.Averages, "wait")}
    inner = {word: getattr(*place) for word, place in named.items()}
    for word, (owner, name) in named.items():
        setattr(owner, name, lambda *given, word=word: done.append(word) or inner[word](*given))
    try:
        update()
    finally:
        for word, (owner, name) in named.items():
            setattr(owner, name, inner[word])
    return done


def goes_on_alone(folder: Path) -> bool:
    """Whether process 0 begins a message and goes on before process 1 has begun it; then both have the mean."""
    rank, gone_on, until = ranks.of_run().rank, folder / "gone on", time.monotonic() + 20
    while rank == 1 and not gone_on.exists() and time.monotonic() < until:
        time.sleep(0.01)
    went_on, x, averages = gone_on.exists() or rank == 0, torch.full((2, 3), float(rank)), ranks.Averages()
    with ranks.sharing():
        averages.begin(x)
        gone_on.touch()
        averages.wait()
    return went_on and bool((x == (ranks.of_run().size - 1) / 2).all())


def main(folder: Path, messages: str | None = None) -> None:
    torch.set_num_threads(1)
    chosen = config()
    dtype = torch.float32 if messages else torch.float64
    with ranks.joined(torch.device("cpu"), messages or "fp32"):
        training, validation = make_batches(chosen.data, 0, share=ranks.of_run())
        torch.manual_seed(0)
        step = TrainingStep(DPGMMVariationalRecurrentAutoencoder.from_config(chosen, training.action_dim).to(dtype), chosen)
        observe = step._observe
        step._observe = lambda pixels: observe(pixels).to(dtype)
        rate, metrics = torch.tensor(1e-3), []
        for perceives in (True, False):
            metrics.append(step.learn_pictures([next(training)], rate, perceives).to_dict())
        for i in range(5):
            metrics.append(step([next(training)], torch.tensor(0.5), rate, i % 2 == 0, i > 0, torch.tensor(0.5)).to_dict())
        two = [next(training), next(training)]
        in_turn = in_order(lambda: metrics.append(step(two, torch.tensor(0.5), rate, True, True, torch.tensor(0.5)).to_dict()))
        ema = step.ema.model
        latents = [LatentReplay(ema, part, 12) for part in (training, validation)]
        phase = LatentPhase(ema, *latents, dataclasses.replace(chosen.optim, latent_phase_updates=8), outcome_share=0.5)
        for _ in range(8):
            phase.update()
        sent = dataclasses.astuple(ranks.traffic)[:2]
        ahead = goes_on_alone(folder)
        untrained = DPGMMVariationalRecurrentAutoencoder.from_config(chosen, training.action_dim).eval()
        validated = validate(untrained, training.one_pass(3), step.losses, training.mean_frame(), chosen.model.codebook_size, 3)
        state = {
            "sent": sent, "order": (in_turn, ahead), "step": step.state_dict(), "metrics": metrics, "phase": phase.state_dict(),
            "measured": phase.measure(), "validated": validated,
        }  # fmt: skip
        torch.save(state, folder / f"{ranks.of_run().rank}.pt")
        training.close()
        validation.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
