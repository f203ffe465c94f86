"""VQPTTokenizer: video -> discrete tokens -> video, causal in time.

A causal 3D convolution with a temporal extent of two frames is y_t = W_now * x_t + W_before * x_{t-1}. It is written here as two 2D
convolutions over B*T frames and one shift: the same function as `nn.Conv3d` on a sequence padded on the left (a test compares them),
in the layout that 2D convolution libraries are fastest at, able to restart at an episode's first frame and to go on from a kept product
W_before * x_{t-1}, so that frames may come all at once or one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from aime_fast.layers import Upsample, downsample, group_norm, halvings, starts
from aime_fast.perceiver_io.quantizer import VectorQuantizer


class CausalConv3d(nn.Module):
    """Convolution over [x_{t-1}, x_t] and a 3x3 neighbourhood; frames before a start count as zero."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.now = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.before = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor, start: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves T frames.

        Args:
            x: [B*T, C, H, W].
            start: bool [B, T], frames before which nothing counts.
            kept: [B, C', H', W'], what the frame before the first one left; without it the first frame is a start.

        Returns:
            ([B*T, C', H', W'], what the last frame leaves).
        """
        before = self.before(x).unflatten(0, start.shape)
        first = torch.zeros_like(before[:, 0]) if kept is None else kept.to(before.dtype)
        shifted = torch.cat([first[:, None], before[:, :-1]], dim=1).masked_fill(start[..., None, None, None], 0.0)
        return self.now(x) + shifted.flatten(0, 1), before[:, -1]


class CausalCell(nn.Module):
    """Residual cell of the tokenizer: one causal convolution in time and space, one in space."""

    def __init__(self, channels: int):
        super().__init__()
        self.before = nn.Sequential(group_norm(channels), nn.SiLU())
        self.causal = CausalConv3d(channels, channels)
        self.after = nn.Sequential(group_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, start: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, kept = self.causal(self.before(x), start, kept)
        return x + self.after(y), kept


class Tokens(NamedTuple):
    """What the tokenizer makes of a video."""

    codes: Tensor  # int64 [B, T, Ht, Wt, Q]
    quantized: Tensor  # [B, T, Ht, Wt, Q * d], straight-through gradient
    commitment: Tensor  # scalar
    perplexity: Tensor  # scalar
    usage: Tensor  # scalar
    kept: tuple[Tensor, ...]  # [B, C, h, w] each: what the encoder's causal convolutions keep of the last frame


class VQPTTokenizer(nn.Module):
    """Causal 3D convolutional VQ-VAE. No connection passes the quantiser, so tokens alone make the video.

    Args:
        image_size: H = W in pixels; the token grid is ceil(H / 8).
        channels: widths at H/2, H/4 and H/8.
        codebook_heads, codebook_size, code_dim: Q, V, d. The code width is Q * d.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: tuple[int, ...] = (64, 128, 256),
        codebook_heads: int = 4,
        codebook_size: int = 1024,
        code_dim: int = 64,
        share_codebook: bool = False,
        codebook_decay: float = 0.99,
    ):
        super().__init__()
        if len(channels) != 3:
            raise ValueError(f"tokenizer_channels is {channels}, expected three widths, for H/2, H/4 and H/8")
        low, middle, high = channels
        full, half, quarter, self.grid = halvings(image_size, 3)
        self.kept_shapes = ((middle, quarter, quarter), (high, self.grid, self.grid), (high, self.grid, self.grid))
        self.image_size, self.width = image_size, codebook_heads * code_dim
        self.quantizer = VectorQuantizer(codebook_heads, codebook_size, code_dim, share_codebook, codebook_decay)

        self.stem = nn.Sequential(downsample(3, low), nn.SiLU(), downsample(low, middle))
        self.encoder = nn.ModuleList([CausalCell(middle), CausalConv3d(middle, high, stride=2), CausalCell(high)])
        self.to_codes = nn.Sequential(group_norm(high), nn.SiLU(), nn.Conv2d(high, self.width, 1))

        self.from_codes = nn.Conv2d(self.width, high, 1)
        self.decoder = nn.ModuleList([CausalCell(high), CausalCell(high)])
        self.head = nn.Sequential(
            group_norm(high), nn.SiLU(), Upsample(high, middle, quarter),
            group_norm(middle), nn.SiLU(), Upsample(middle, low, half),
            nn.SiLU(), Upsample(low, 3, full),
        )  # fmt: skip

    def nothing_kept(self, batch: int) -> tuple[Tensor, ...]:
        """`Tokens.kept` before a first frame: zeros."""
        like = self.quantizer.codebook
        return tuple(torch.zeros(batch, *shape, device=like.device, dtype=like.dtype) for shape in self.kept_shapes)

    def tokenize(self, video: Tensor, is_init: Tensor | None = None, kept: tuple[Tensor, ...] | None = None) -> Tokens:
        """video [B, T, 3, H, W] in [-1, 1] -> `Tokens`. In training mode the codebook learns from it.

        With `kept` of the frames before, `video` goes on where they ended: T frames at once or one by one give the same tokens.
        """
        batch, frames = video.shape[:2]
        start = starts(is_init, batch, frames, video.device, first=kept is None)
        x = self.stem(video.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        left = []
        for layer, before in zip(self.encoder, kept or (None, None, None)):
            x, after = layer(x, start, before)
            left.append(after)
        vectors = rearrange(self.to_codes(x), "n (q d) h w -> (n h w) q d", q=self.quantizer.heads)
        found = self.quantizer(vectors)
        grid = dict(b=batch, t=frames, h=self.grid, w=self.grid)
        return Tokens(
            rearrange(found.codes, "(b t h w) q -> b t h w q", **grid),
            rearrange(found.vectors, "(b t h w) q d -> b t h w (q d)", **grid),
            found.commitment, found.perplexity, found.usage, tuple(left),
        )  # fmt: skip

    def encode(self, video: Tensor, is_init: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """video [B, T, 3, H, W] in [-1, 1] -> (tokens int64 [B, T, Ht, Wt, Q], vq_loss scalar, perplexity scalar)."""
        tokens = self.tokenize(video, is_init)
        return tokens.codes, tokens.commitment, tokens.perplexity

    def embed(self, codes: Tensor) -> Tensor:
        """tokens int64 [B, T, Ht, Wt, Q] -> code vectors [B, T, Ht, Wt, Q * d], without gradient."""
        return self.quantizer.lookup(codes).flatten(-2)

    def decode_vectors(self, quantized: Tensor, is_init: Tensor | None = None) -> Tensor:
        """code vectors [B, T, Ht, Wt, Q * d] -> video [B, T, 3, H, W]."""
        batch, frames = quantized.shape[:2]
        start = starts(is_init, batch, frames, quantized.device)
        x = self.from_codes(rearrange(quantized, "b t h w c -> (b t) c h w"))
        for layer in self.decoder:
            x, _ = layer(x, start)
        return self.head(x).unflatten(0, (batch, frames))

    def decode(self, tokens: Tensor, is_init: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T, Ht, Wt, Q] -> video [B, T, 3, H, W], values about [-1, 1]."""
        return self.decode_vectors(self.embed(tokens), is_init)
