"""VAEDecoder: p(x_t | z_t, A_t), the mirror of the encoder; its only inputs are the latent and the attention map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.encoder_decoder.likelihoods import Gaussian, MixtureOfLogistics
from aime_fast.encoder_decoder.reference import PLACE_SCALE, moved
from aime_fast.layers import FromPatches, ResidualCell, Upsample, full_precision, halvings, outside_autocast


class AttentionModulation(nn.Module):
    """Feature maps scaled and shifted by the attention map: x + a (s x + t), with a = log(1 + A Ha Wa) resized to x."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.randn(channels) * 0.1)

    def forward(self, x: Tensor, attention: Tensor) -> Tensor:  # [N, C, H, W], [N, 1, Ha, Wa] -> [N, C, H, W]
        a = F.interpolate(attention, x.shape[-2:], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        x = x.permute(0, 2, 3, 1)  # channels last in memory: every product below runs along contiguous channels
        return torch.addcmul(x, a, torch.addcmul(self.shift, x, self.scale)).permute(0, 3, 1, 2)


class VAEDecoder(nn.Module):
    """Decodes frames from z and A: a dense layer at H/16, transposed convolutions up to H/4, and a patch of pixels for each place there.

    All that is drawn in the encoder's frame of reference; a linear map of z says where the picture goes.

    Args:
        image_size: H = W.
        latent_dim: Z.
        channels: the encoder's widths, at H/4, H/8, H/16.
        blocks: residual cells at each resolution.
        dense: width of the dense layer.
        likelihood: "gaussian" or "mol".
        likelihood_std: standard deviation of the Gaussian, pixels in [-1, 1].
        mol_components: logistics of the mixture.

    `background` [3, H, W] is a learnt image to which the output is added; the trainer sets it to the mean training frame at first.
    """

    def __init__(
        self,
        image_size: int,
        latent_dim: int,
        channels: tuple[int, ...],
        blocks: int = ModelConfig.blocks_per_level,
        dense: int = ModelConfig.dense_dim,
        likelihood: str = ModelConfig.likelihood,
        likelihood_std: float = ModelConfig.likelihood_std,
        mol_components: int = ModelConfig.mol_components,
    ):
        super().__init__()
        *_, quarter, eighth, self.grid = halvings(image_size, 4)
        self.map_scale = image_size / (8 * eighth)  # cells of a map may reach beyond the picture
        c4, c8, c16 = channels
        if likelihood not in ("gaussian", "mol"):
            raise ValueError(f"likelihood is {likelihood!r}, expected 'gaussian' or 'mol'")
        self.likelihood = Gaussian(likelihood_std) if likelihood == "gaussian" else MixtureOfLogistics(mol_components)
        self.background = nn.Parameter(torch.zeros(3, image_size, image_size))
        self.place = nn.Linear(latent_dim, 2, bias=False)
        self.unpool = nn.Sequential(
            nn.Linear(latent_dim, dense), nn.SiLU(), nn.Linear(dense, c16 * self.grid**2), nn.Unflatten(1, (c16, self.grid, self.grid))
        )
        widths = (c16, c8, c4)
        self.up = nn.ModuleList([Upsample(c16, c8, eighth), Upsample(c8, c4, quarter)])
        self.modulations = nn.ModuleList(AttentionModulation(c) for c in widths)
        self.levels = nn.ModuleList(nn.Sequential(*(ResidualCell(c) for _ in range(blocks)), nn.SiLU()) for c in widths)
        self.head = FromPatches(c4, self.likelihood.channels, image_size)
        with torch.no_grad():
            nn.init.eye_(self.place.weight).div_(PLACE_SCALE)  # the encoder's first two latents
            self.head.linear.weight.zero_()  # the first output is the background: a random picture would teach it to ignore z
            self.head.linear.bias.zero_()

    def forward(self, latents: Tensor, attention: Tensor) -> Tensor:
        """latents [N, Z], attention [N, Ha, Wa] (sums to 1) -> parameters of p(x | z, A) [N, P, H, W], P = 3 for the Gaussian."""
        with outside_autocast(latents):
            where = self.place(full_precision(latents))
        a = torch.log1p(attention * attention[0].numel()).unsqueeze(1).to(latents.dtype)
        a = moved(a, -where * self.map_scale, repeat_edge=True)
        x = self.unpool(latents).contiguous(memory_format=torch.channels_last)
        for enter, modulate, level in zip((nn.Identity(), *self.up), self.modulations, self.levels):
            x = level(modulate(enter(x), a))
        return self.likelihood.around(full_precision(moved(self.head(x), where, repeat_edge=True)), self.background)
