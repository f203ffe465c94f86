"""Measures of frames, codes, mixture weights and predicted latents, for validation and evaluation alike.

Frames are float in [-1, 1]; those of a model are clamped first, as they would be displayed. PSNR is that of a mean squared error pooled
over clips: the mean of per-frame PSNRs would be infinite where a still frame is repeated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from aime_fast.evaluation.sums import Sums
from aime_fast.generative_prior import get_effective_components
from aime_fast.multi_task_learning.losses import mixture_log_prob

PIXEL_RANGE = 2.0  # of frames in [-1, 1]
MAX_PSNR = 100.0  # dB, stands for equal frames, since JSON has no infinity; uint8 rounding limits others to 59
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # of Wang et al. 2004
RANK_SAMPLES, RANK_BINS = 99, 10  # 99 samples give 100 ranks, ten for each bin


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of frames in [-1, 1] from their mean squared error, at most `MAX_PSNR`."""
    return min(MAX_PSNR, 10.0 * math.log10(PIXEL_RANGE**2 / max(squared_error, 1e-30)))


def squared_error(decoded: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each frame, [..., 3, H, W] -> float32 [...]."""
    return (decoded.float().clamp(-1, 1) - truth.float()).square().mean((-3, -2, -1))


def ssim(decoded: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each frame, [..., 3, H, W] -> float32 [...]; Wang et al. 2004, equation 13, mean over pixels and colours.

    The picture is mirrored at its border, as in TorchMetrics, with which a test compares; blurring by two matrix products is faster.
    """
    x, y = torch.broadcast_tensors(decoded.float().clamp(-1, 1), truth.float())
    across, down = (_gaussian_windows(size, x) for size in (x.shape[-1], x.shape[-2]))
    with torch.autocast(x.device.type, enabled=False):  # variances are small differences

        def blur(t: Tensor) -> Tensor:  # [..., H, W] -> [..., W, H]
            return (t @ across).transpose(-1, -2) @ down

        mean_x, mean_y = blur(x), blur(y)
        covariance = blur(x * y) - mean_x * mean_y
        variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    c1, c2 = (0.01 * PIXEL_RANGE) ** 2, (0.03 * PIXEL_RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.mean((-3, -2, -1))


def _gaussian_windows(size: int, like: Tensor) -> Tensor:
    """The window around every pixel of an axis, as columns of a matrix [size, size]."""
    reach = min(SSIM_WINDOW // 2, size - 1)
    offsets = torch.arange(-reach, reach + 1)
    window = torch.softmax(-0.5 * (offsets / SSIM_SIGMA).square(), 0)
    index = (torch.arange(size)[:, None] + offsets).abs()
    index = torch.where(index < size, index, 2 * (size - 1) - index)  # mirrored
    return torch.zeros(size, size).scatter_add_(1, index, window.expand(size, -1)).T.to(like)


class Reconstruction:
    """Reconstruction of held-out batches, beside a constant picture, and usage of codebook and mixture.

    Args:
        mean_frame: [3, H, W] in [-1, 1], the baseline.
        codebook_size: V.

    Attributes: sums: over the batches so far.
    """

    def __init__(self, mean_frame: Tensor, codebook_size: int):
        self.mean_frame, self.codebook_size = mean_frame, codebook_size
        self.sums = Sums()

    @property
    def frames(self) -> int:
        """How many were measured."""
        return int(self.sums["frames"]) if "frames" in self.sums else 0

    def update(self, outputs: Mapping[str, Tensor], video: Tensor) -> None:
        """Add a batch: outputs of `forward_sequence`, and its frames [B, T, 3, H, W] in [-1, 1]."""
        decoded, weights = outputs["reconstructions"], outputs["mixture_weights"].float().flatten(0, 1)  # [B*T, K]
        codes = outputs["tokens"].flatten(0, -2)  # [B*T*Ht*Wt, Q]
        measured = {
            "squared_error": squared_error(decoded, video),
            "squared_error_mean_frame": squared_error(self.mean_frame, video),
            "ssim": ssim(decoded, video),
            "ssim_mean_frame": ssim(self.mean_frame, video),
            "per_frame": get_effective_components(weights)[1],
        }
        for name, values in measured.items():
            self.sums.add(name, values.double().sum())
        occurred = [head.bincount(minlength=self.codebook_size) for head in codes.unbind(1)]
        self.sums.add("codes", torch.stack(occurred))  # [Q, V]
        self.sums.add("weights", weights.double().sum(0))  # [K]
        self.sums.add("likeliest", weights.argmax(-1).bincount(minlength=weights.shape[-1]))  # [K]
        self.sums.add("frames", len(weights))

    def compute(self) -> dict[str, float]:
        """The measures over all batches.

        psnr, ssim, psnr_mean_frame, ssim_mean_frame: of all frames. code_usage: share of the V codes of a head that occur, mean over
        heads. code_perplexity: exp of the entropy of their frequencies, mean over heads. effective_components: exp of the entropy of
        the mixture weights averaged over all frames, so 1 where every frame uses the same one; effective_components_per_frame: of each
        frame's weights, averaged. components_used: components that are the likeliest one in some frame.

        Raises ValueError where there was no batch.
        """
        if not (frames := self.frames):
            raise ValueError("the held-out episodes give no sequence; raise --validation-fraction or lower --sequence-length")
        codes, mean = self.sums["codes"], lambda name: self.sums[name] / frames
        share = codes / codes.sum(1, keepdim=True)
        return {
            "psnr": psnr(mean("squared_error").item()),
            "ssim": mean("ssim").item(),
            "psnr_mean_frame": psnr(mean("squared_error_mean_frame").item()),
            "ssim_mean_frame": mean("ssim_mean_frame").item(),
            "code_usage": (codes > 0).double().mean().item(),
            "code_perplexity": torch.special.entr(share).sum(1).exp().mean().item(),
            "effective_components": get_effective_components(mean("weights"))[1].item(),
            "effective_components_per_frame": mean("per_frame").item(),
            "components_used": int((self.sums["likeliest"] > 0).sum()),
        }


def prior_ranks(z: Tensor, log_weights: Tensor, means: Tensor, logvars: Tensor, samples: int = RANK_SAMPLES) -> tuple[Tensor, Tensor]:
    """How log p(z) under a mixture compares with log p of the mixture's own samples.

    Where z is a sample of the mixture, its rank among `samples` others is uniform on 0..samples, whatever the mixture (Talts et al.,
    arXiv 1804.06788, with log p as the one-dimensional quantity). Latents that are improbable under the prior have low ranks; latents at
    the modes of too wide a prior have high ones.

    Args: z [N, Z]; log_weights [N, K]; means, logvars [N, K, Z].

    Returns:
        (rank int64 [N] in 0..samples: how many samples are less likely than z; log p(z) minus the mean log p of the samples, [N], nats).
    """
    gumbel = -torch.empty(samples, *log_weights.shape, device=z.device).exponential_().log()
    chosen = (log_weights + gumbel).argmax(-1).T  # [N, samples]
    index = chosen[..., None].expand(-1, -1, z.shape[-1])
    mean, logvar = means.gather(1, index), logvars.gather(1, index)  # [N, samples, Z]
    sampled = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
    own = mixture_log_prob(sampled, log_weights[:, None], means[:, None], logvars[:, None])  # [N, samples]
    true = mixture_log_prob(z, log_weights, means, logvars)
    return (own < true[:, None]).sum(1), true - own.mean(1)


class Calibration:
    """Ranks of posterior samples under the one-step prior over held-out batches, see `prior_ranks`."""

    def __init__(self):
        self._ranks: list[Tensor] = []
        self._differences: list[Tensor] = []

    def update(self, outputs: Mapping[str, Tensor], start: Tensor) -> None:
        """Add a batch: outputs of `forward_sequence`; start bool [B, T] or [B, T, 1], frames with nothing before them, left out."""
        later = ~start.reshape(outputs["mixture_weights"].shape[:2])
        weights, means, logvars, q_mean, q_logvar = (
            outputs[name][later].float()
            for name in ("mixture_weights", "component_means", "component_logvars", "posterior_mean", "posterior_logvar")
        )
        z = q_mean + torch.randn_like(q_mean) * (0.5 * q_logvar).exp()
        log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        ranks, differences = prior_ranks(z, log_weights, means, logvars)
        self._ranks.append(ranks.cpu())
        self._differences.append(differences.cpu())

    def compute(self) -> dict:
        """frames; rank_histogram: share of the frames in each tenth of the ranks, lowest first, 0.1 each where the prior is calibrated;
        log_prob_difference: nats, 0 where it is. Raises ValueError where no frame had one before it."""
        ranks = torch.cat(self._ranks) if self._ranks else torch.zeros(0)
        if not len(ranks):
            raise ValueError("calibration: no held-out frame has a frame before it; raise --sequence-length of the run")
        counts = (ranks * RANK_BINS // (RANK_SAMPLES + 1)).bincount(minlength=RANK_BINS)
        return {
            "frames": len(ranks),
            "rank_histogram": (counts / len(ranks)).tolist(),
            "log_prob_difference": torch.cat(self._differences).double().mean().item(),
        }
