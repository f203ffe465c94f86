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
from aime_fast.evaluation.sums import Sums
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.runtime import ranks

PROBE_EVERY = 4  # one of so many batches is probed: on a CPU that makes a validation of four batches a sixth longer


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[TensorDict], losses: LossAggregator, mean_frame: Tensor, codebook_size: int, limit: int
) -> dict[str, float]:
    """Losses and measures over at most `limit` held-out batches, with the model in eval mode.

    Of several processes each measures every Nth batch, and all return the measures of all. Random numbers depend on a batch's place alone.

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
    measured, probes, terms = Reconstruction(mean_frame, codebook_size), ValidationProbes(), Sums()
    share = ranks.of_run()
    for number, batch in islice(enumerate(batches), share.rank, limit, share.size):
        torch.manual_seed(number)
        video = normalise(batch["pixels"])  # [B, T, 3, H, W]
        outputs = model.forward_sequence(video, batch["action"], batch["is_init"], brought=(batch["reward"], batch["discount"]))
        measured.update(outputs, video)
        if number % PROBE_EVERY == 0:
            probes.update(model, video, batch["action"], batch["is_init"], outputs, seed=number // PROBE_EVERY)
        for name, value in losses.compute_losses(outputs)[0].items():
            terms.add(name, value.float() * len(video))
        terms.add("sequences", len(video))
    for sums in (measured.sums, probes.sums, terms):
        sums.join()
    weighed = {f"loss/{name}": float(terms[name] / terms["sequences"]) for name in terms if name != "sequences"}
    return measured.compute() | weighed | probes.compute()


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
