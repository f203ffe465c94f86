"""Evaluation of a trained model on held-out episodes: reconstruction, open-loop prediction, and what is in use.

Convention (that of the best precedent for open-loop video): `context` frames are shown, `horizon` frames predicted from actions
alone, measured on the horizon only, beside repeat-last-frame. PSNR is that of the mean squared error pooled over all clips: the mean
of per-frame PSNRs would be infinite where a still frame is repeated exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from aime_fast.data import SequenceBatches, normalise
from aime_fast.generative_prior import get_effective_components
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

PIXEL_RANGE = 2.0  # frames are in [-1, 1]


@dataclass(frozen=True)
class Clips:
    """Clips of context + horizon frames, cut without overlap from whole episodes."""

    video: Tensor  # float [N, F, 3, H, W]
    actions: Tensor  # [N, F, A]
    context: int

    def __len__(self) -> int:
        return self.video.shape[0]

    def split(self, size: int) -> Iterator[Clips]:
        for video, actions in zip(self.video.split(size), self.actions.split(size)):
            yield Clips(video, actions, self.context)


def cut_clips(episodes: list[TensorDict], context: int, horizon: int, per_episode: int) -> Clips:
    """Up to `per_episode` clips from each episode, evenly spread.

    Args: episodes with `pixels` uint8 [T, 3, H, W] and `action` [T, A].

    Raises ValueError: context or horizon below 1, or every episode is shorter than a clip.
    """
    if context < 1 or horizon < 1 or per_episode < 1:
        raise ValueError(f"--context {context}, --horizon {horizon}, --clips {per_episode}: each must be at least 1")
    frames, video, actions = context + horizon, [], []
    for episode in episodes:
        length = episode.shape[0]
        count = min(per_episode, length // frames)
        for i in range(count):
            first = round(i * (length - frames) / max(count - 1, 1))
            video.append(normalise(episode["pixels"][first : first + frames]))
            actions.append(episode["action"][first : first + frames])
    if not video:
        longest = max(episode.shape[0] for episode in episodes)
        raise ValueError(f"--context {context} --horizon {horizon}: the longest held-out episode has {longest} frames, ask for fewer")
    return Clips(torch.stack(video), torch.stack(actions), context)


def predict(model: DPGMMVariationalRecurrentAutoencoder, clips: Clips, future_actions: Tensor) -> TensorDict:
    """Open-loop prediction of the horizon of each clip, with the actions given for it [N, horizon, A]."""
    shown = slice(None, clips.context)
    return model.predict_future(clips.video[:, shown], clips.actions[:, shown], future_actions)


def frame_scores(drawn: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """PSNR (dB) and SSIM for each step of [N, F, 3, H, W], pooled over N."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    drawn = drawn.clamp(-1, 1)
    steps = list(zip(drawn.unbind(1), truth.unbind(1)))
    return {
        "psnr": [peak_signal_noise_ratio(d, t, data_range=PIXEL_RANGE).item() for d, t in steps],
        "ssim": [structural_similarity_index_measure(d, t, data_range=PIXEL_RANGE).item() for d, t in steps],
    }


@torch.no_grad()
def evaluate_prediction(model: DPGMMVariationalRecurrentAutoencoder, clips: Clips, batch: int = 16) -> dict:
    """Open-loop PSNR and SSIM per step of the horizon beside repeat-last-frame, and the action-shuffle ratio.

    The ratio is the squared error with every clip given another clip's actions, over the squared error with its own: 1 where
    actions are ignored. It is None for a single clip.
    """
    c = clips.context
    shuffled = clips.actions.roll(1, 0)[:, c:]
    own, others = [], []
    for part, wrong in zip(clips.split(batch), shuffled.split(batch)):
        own.append(predict(model, part, part.actions[:, c:])["reconstructions"])
        others.append(predict(model, part, wrong)["reconstructions"])
    drawn, misled, truth = torch.cat(own), torch.cat(others), clips.video[:, c:]
    error, misled_error = ((x.clamp(-1, 1) - truth).square().mean().item() for x in (drawn, misled))
    repeated = clips.video[:, c - 1 : c].expand_as(truth)
    return {
        "clips": len(clips),
        "context": c,
        "horizon": truth.shape[1],
        "model": frame_scores(drawn, truth),
        "repeat_last_frame": frame_scores(repeated, truth),
        "action_shuffle_ratio": misled_error / error if len(clips) > 1 else None,
    }


@torch.no_grad()
def evaluate_reconstruction(
    model: DPGMMVariationalRecurrentAutoencoder, batches: Iterator[TensorDict], mean_frame: Tensor, codebook_size: int
) -> dict:
    """Reconstruction of held-out sequences beside the mean training frame, and how much of codebook and mixture is in use.

    Returns: psnr, ssim, psnr_mean_frame, ssim_mean_frame; code_usage (share of the V codes of a head that occur at all, mean over
    heads) and code_perplexity; effective_components (exp of the entropy of the average mixture weights), components_used (that are
    the likeliest somewhere); token_accuracy (teacher-forced).
    """
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    device = mean_frame.device
    names = [f"{metric}{of}" for metric in ("psnr", "ssim") for of in ("", "_mean_frame")]
    kinds = {"psnr": PeakSignalNoiseRatio, "ssim": StructuralSimilarityIndexMeasure}
    metrics = {name: kinds[name[:4]](data_range=(-1.0, 1.0)).to(device) for name in names}
    counts, weights, likeliest, accuracy = None, 0.0, set(), []
    for batch in batches:
        video = normalise(batch["pixels"])
        out = model.forward_sequence(video, batch["action"], batch["is_init"])
        truth = video.flatten(0, 1)
        for name, metric in metrics.items():
            drawn = mean_frame.expand_as(truth) if name.endswith("mean_frame") else out["reconstructions"].flatten(0, 1).float()
            metric.update(drawn, truth)
        codes = out["tokens"].flatten(0, -2)  # [N, Q]
        found = torch.stack([head.bincount(minlength=codebook_size) for head in codes.unbind(1)])  # [Q, V]
        counts = found if counts is None else counts + found
        pi = out["mixture_weights"].flatten(0, 1)
        weights = weights + pi.sum(0)
        likeliest |= set(pi.argmax(-1).tolist())
        accuracy.append(out["token_accuracy"].item())
    if counts is None:
        raise ValueError("there is no held-out sequence; raise --validation-fraction or lower --sequence-length of the run")
    share, pi = counts / counts.sum(1, keepdim=True), weights / weights.sum()
    return {name: metric.compute().item() for name, metric in metrics.items()} | {
        "code_usage": (counts > 0).float().mean().item(),
        "code_perplexity": torch.special.entr(share).sum(1).exp().mean().item(),
        "effective_components": get_effective_components(pi)[1].item(),
        "components_used": len(likeliest),
        "token_accuracy": sum(accuracy) / len(accuracy),
    }


def held_out_episodes(validation: SequenceBatches, limit: int | None) -> list[TensorDict]:
    """The first `limit` held-out episodes, or all."""
    return [validation.episode(i) for i in range(len(validation.episodes))][:limit]
