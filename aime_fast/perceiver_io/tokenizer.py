"""VQPTTokenizer: video -> discrete tokens -> video, causal in time.

A causal 3D convolution with a temporal extent of two frames is y_t = W_now * x_t + W_before * x_{t-1}. It is written here as two 2D
convolutions over B*T frames and one shift: the same function as `nn.Conv3d` on a sequence padded on the left (a test compares them),
in the layout in which 2D convolutions are fastest. It restarts at an episode's first frame, and continues from a cached product
W_before * x_{t-1}, so that frames may come all at once or one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.layers import FromPatches, GroupNormSiLU, ToPatches, Upsample, halvings, starts, to_frames
from aime_fast.perceiver_io.quantizer import VectorQuantizer


class CausalConv3d(nn.Module):
    """Convolution over [x_{t-1}, x_t] and a 3x3 neighbourhood; frames before a start count as zero."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.now = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.before = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor, start: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolves T frames.

        Args:
            x: [B*T, C, H, W].
            start: bool [B, T], frames whose predecessor counts as zero.
            cache: [B, C', H', W'], the product of the frame before the first one; None counts as zero.

        Returns:
            ([B*T, C', H', W'], the cache after the last frame).
        """
        before = self.before(x).unflatten(0, start.shape)
        first = torch.zeros_like(before[:, 0]) if cache is None else cache.to(before.dtype)
        shifted = torch.cat([first[:, None], before[:, :-1]], dim=1).masked_fill(start[..., None, None, None], 0.0)
        return self.now(x) + shifted.flatten(0, 1), before[:, -1]


class CausalCell(nn.Module):
    """Residual cell of the tokenizer: one causal convolution in time and space, one in space."""

    def __init__(self, channels: int):
        super().__init__()
        self.before = GroupNormSiLU(channels)
        self.causal = CausalConv3d(channels, channels)
        self.after = nn.Sequential(GroupNormSiLU(channels), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, start: Tensor, cache: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `CausalConv3d.forward`, with C' = C."""
        y, cache = self.causal(self.before(x), start, cache)
        return x + self.after(y), cache


class Tokens(NamedTuple):
    """Tokens of B sequences of T frames."""

    codes: Tensor  # int64 [B, T, Ht, Wt, Q]
    quantized: Tensor  # [B, T, Ht, Wt, Q * d], straight-through gradient
    commitment: Tensor  # scalar, mean squared distance to the code
    perplexity: Tensor  # scalar, of the codes of this batch
    usage: Tensor  # scalar, share of codes in use in this batch
    cache: tuple[Tensor, ...]  # [B, C, h, w] each, of the encoder's causal convolutions after the last frame
    vectors: Tensor  # [B * T * Ht * Wt, Q, d], before quantisation, without gradient


class VQPTTokenizer(nn.Module):
    """Causal 3D convolutional VQ-VAE. No skip connection crosses the quantiser: `decode` needs tokens alone.

    Args:
        image_size: H = W in pixels; the token grid is ceil(H / 8).
        channels: widths at H/4 and H/8.
        codebook_heads, codebook_size, code_dim: Q, V, d. The code width is Q * d.
    """

    def __init__(
        self,
        image_size: int = 64,
        channels: tuple[int, ...] = ModelConfig.tokenizer_channels,
        codebook_heads: int = ModelConfig.codebook_heads,
        codebook_size: int = ModelConfig.codebook_size,
        code_dim: int = ModelConfig.code_dim,
        share_codebook: bool = ModelConfig.share_codebook,
        codebook_decay: float = ModelConfig.codebook_decay,
    ):
        super().__init__()
        if len(channels) != 2:
            raise ValueError(f"tokenizer_channels is {channels}, expected two widths, for H/4 and H/8")
        middle, high = channels
        *_, quarter, self.grid = halvings(image_size, 3)
        self.cache_shapes = ((high, self.grid, self.grid), (high, self.grid, self.grid))
        self.image_size, self.width = image_size, codebook_heads * code_dim
        self.quantizer = VectorQuantizer(codebook_heads, codebook_size, code_dim, share_codebook, codebook_decay)

        self.stem = nn.Sequential(ToPatches(middle), nn.SiLU())
        self.encoder = nn.ModuleList([CausalConv3d(middle, high, stride=2), CausalCell(high)])
        self.to_codes = nn.Sequential(GroupNormSiLU(high), nn.Conv2d(high, self.width, 1))

        self.from_codes = nn.Conv2d(self.width, high, 1)
        self.decoder = nn.ModuleList([CausalCell(high)])
        self.head = nn.Sequential(
            GroupNormSiLU(high), Upsample(high, middle, quarter), nn.SiLU(), FromPatches(middle, 3, image_size)
        )  # fmt: skip

    def empty_cache(self, batch: int) -> tuple[Tensor, ...]:
        """`Tokens.cache` before a first frame: zeros [batch, C, h, w]."""
        like = self.quantizer.codebook
        return tuple(torch.zeros(batch, *shape, device=like.device, dtype=like.dtype) for shape in self.cache_shapes)

    def tokenize(self, video: Tensor, start: Tensor, cache: tuple[Tensor, ...] | None = None, learn: bool = False) -> Tokens:
        """video [B, T, 3, H, W] in [-1, 1], start bool [B, T] -> `Tokens`.

        With the cache of the frames before, `video` continues them: T frames at once or one by one give the same tokens. With `learn` an
        uninitialised codebook is initialised by the video; `learn` itself is to be called when nothing reads this codebook any more.
        """
        batch, frames = video.shape[:2]
        x = self.stem(video.flatten(0, 1))
        caches = []
        for layer, before in zip(self.encoder, cache or (None, None)):
            x, after = layer(x, start, before)
            caches.append(after)
        vectors = rearrange(self.to_codes(x), "n (q d) h w -> (n h w) q d", q=self.quantizer.heads)
        if learn:
            self.quantizer.initialise(vectors.detach(), batch)
        quantized = self.quantizer(vectors, counts_all=learn)
        grid = dict(b=batch, t=frames, h=self.grid, w=self.grid)
        return Tokens(
            rearrange(quantized.codes, "(b t h w) q -> b t h w q", **grid),
            rearrange(quantized.vectors, "(b t h w) q d -> b t h w (q d)", **grid),
            quantized.commitment, quantized.perplexity, quantized.usage, tuple(caches), vectors.detach(),
        )  # fmt: skip

    def learn(self, tokens: Tokens) -> None:
        """Update the codebook by the tokens of a batch."""
        self.quantizer.learn(tokens.vectors, tokens.codes.flatten(0, -2), len(tokens.codes))

    def encode(self, video: Tensor, is_init: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """video [B, T, 3, H, W], uint8 or in [-1, 1] -> (tokens int64 [B, T, Ht, Wt, Q], vq_loss scalar, perplexity scalar)."""
        tokens = self.tokenize(to_frames(video, self.from_codes.weight.dtype), starts(is_init, *video.shape[:2], video.device))
        return tokens.codes, tokens.commitment, tokens.perplexity

    def embed(self, codes: Tensor) -> Tensor:
        """tokens int64 [B, T, Ht, Wt, Q] -> code vectors [B, T, Ht, Wt, Q * d], without gradient."""
        return self.quantizer.lookup(codes).flatten(-2)

    def decode_vectors(self, quantized: Tensor, start: Tensor) -> Tensor:
        """code vectors [B, T, Ht, Wt, Q * d], start bool [B, T] -> video [B, T, 3, H, W]."""
        x = self.from_codes(rearrange(quantized, "b t h w c -> (b t) c h w"))
        for layer in self.decoder:
            x, _ = layer(x, start)
        return self.head(x).unflatten(0, start.shape)

    def decode(self, tokens: Tensor, is_init: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T, Ht, Wt, Q] -> video [B, T, 3, H, W], values about [-1, 1]."""
        return self.decode_vectors(self.embed(tokens), starts(is_init, *tokens.shape[:2], tokens.device))
