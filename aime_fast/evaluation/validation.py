"""Measures of a model on sequences of held-out episodes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.data import normalise
from aime_fast.evaluation.measures import Calibration, Reconstruction
from aime_fast.evaluation.probes import ValidationProbes
from aime_fast.multi_task_learning import LossAggregator

PROBE_EVERY = 4  # one of so many batches is probed: on a CPU that makes a validation of four batches a sixth longer


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[TensorDict], losses: LossAggregator, mean_frame: Tensor, codebook_size: int, limit: int
) -> dict[str, float]:
    """Losses and measures over at most `limit` held-out batches, with the model in eval mode.

    Args:
        model: in eval mode.
        batches: with `pixels` uint8 [B, T, 3, H, W], `action`, `reward`, `discount`, `is_init`, on the model's device.
        losses: weighs the terms, with beta as after warm-up.
        mean_frame: [3, H, W] in [-1, 1], the baseline.
        codebook_size: V.
        limit: number of batches.

    Returns:
        what `measures.Reconstruction` measures, every loss as `loss/<name>`, and what `probes.ValidationProbes` measures.

    Raises:
        ValueError: the held-out episodes give no batch.
    """
    measured, probes = Reconstruction(mean_frame, codebook_size), ValidationProbes()
    totals: dict[str, Tensor | float] = {}
    count = 0
    for number, batch in enumerate(islice(batches, limit)):
        video = normalise(batch["pixels"])  # [B, T, 3, H, W]
        outputs = model.forward_sequence(video, batch["action"], batch["is_init"], brought=(batch["reward"], batch["discount"]))
        measured.update(outputs, video)
        if number % PROBE_EVERY == 0:
            probes.update(model, video, batch["action"], batch["is_init"], outputs)
        for name, value in losses.compute_losses(outputs)[0].items():
            totals[name] = totals.get(name, 0.0) + value.float() * len(video)
        count += len(video)
    return measured.compute() | {f"loss/{name}": float(total) / count for name, total in totals.items()} | probes.compute()


@torch.no_grad()
def evaluate_sequences(
    model: nn.Module, batches: Iterable[TensorDict], mean_frame: Tensor, codebook_size: int, seed: int = 0
) -> dict[str, dict]:
    """Measures of held-out sequences of the trained length; arguments as in `validate`; seed of all random numbers.

    Returns: `reconstruction` (see `measures.Reconstruction`, and the teacher-forced token_accuracy), `calibration` of the one-step prior
    (see `measures.Calibration`).
    """
    torch.manual_seed(seed)  # posterior samples of the KL and of the calibration
    reconstruction, calibration, correct = Reconstruction(mean_frame, codebook_size), Calibration(), 0.0
    for batch in batches:
        video = normalise(batch["pixels"])
        outputs = model.forward_sequence(video, batch["action"], batch["is_init"])
        start = batch["is_init"].squeeze(-1).clone()
        start[:, 0] = True
        reconstruction.update(outputs, video)
        calibration.update(outputs, start)
        correct += outputs["token_accuracy"].item() * video.shape[:2].numel()
    measured = reconstruction.compute()
    return {"reconstruction": measured | {"token_accuracy": correct / reconstruction.frames}, "calibration": calibration.compute()}
