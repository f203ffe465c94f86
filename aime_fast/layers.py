"""Layers that several pillars share: shifting in time, positions, transformer blocks, residual cells."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kernels.group_norm import group_norm_silu

PATCH = 4  # pixels along the edge of a patch
DELTA_SCALE = 5.0  # of the movement of latents where a network reads it: near a standard deviation of 1 for cartpole at tier 1


def full_precision(x: Tensor) -> Tensor:
    """bf16 and fp16 [...] become fp32; fp32 and fp64 stay. Losses, log-densities and softmax maps leave autocast here."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def to_frames(pixels: Tensor, dtype: torch.dtype = torch.float32, check: bool = True) -> Tensor:
    """The one rule for pixels: uint8, or float in [-1, 1], of any shape -> `dtype` in [-1, 1]; 0 becomes -1, 255 becomes 1.

    `check` reads the range of floats, which waits for the device: inside a compiled or captured step it is left out.

    Raises:
        ValueError: another dtype, or floats outside [-1, 1].
    """
    if pixels.dtype == torch.uint8:
        return pixels.to(dtype) / 127.5 - 1.0
    if not pixels.is_floating_point():
        raise ValueError(f"pixels are {pixels.dtype}, expected uint8, or float in [-1, 1]")
    if check and not torch.compiler.is_compiling() and pixels.numel():
        low, high = (x.item() for x in pixels.detach().aminmax())
        if not (low >= -1.001 and high <= 1.001):
            raise ValueError(f"pixels are floats in [{low:g}, {high:g}], expected [-1, 1]; give uint8, or divide by 127.5 and subtract 1")
    return pixels.to(dtype)


def outside_autocast(x: Tensor) -> torch.autocast:
    """A context in which matrix products of x's device keep their inputs' precision. Inputs leave through `full_precision`."""
    return torch.autocast(x.device.type, enabled=False)


def starts(is_init: Tensor | None, batch: int, frames: int, device: torch.device, first: bool = True) -> Tensor:
    """The frames at which recurrent state, context and attention restart: bool [B, T].

    These are the frames that `is_init` [B, T] or [B, T, 1] marks and, if `first`, the first one of the sequence.
    """
    zeros = torch.zeros(batch, frames, dtype=torch.bool, device=device)
    marked = zeros if is_init is None else is_init.reshape(batch, frames).bool()
    return marked | (torch.arange(frames, device=device) == 0) if first else marked


def previous(x: Tensor, start: Tensor, initial: Tensor | float = 0.0) -> Tensor:
    """x one frame earlier, [B, T, ...]; `initial` where a frame has no predecessor.

    Args:
        x: [B, T, ...].
        start: bool [B, T], see `starts`.
        initial: broadcasts against [B, T, ...].
    """
    shifted = torch.cat([x[:, :1], x[:, :-1]], dim=1)
    mask = start.reshape(*start.shape, *(1,) * (x.dim() - 2))
    return torch.where(mask, initial.to(x.dtype) if isinstance(initial, Tensor) else initial, shifted)


def delta_from(before: Tensor, x: Tensor, start: Tensor) -> Tensor:
    """x [B, T, D] minus `before`, `previous` of it; 0 in an episode's first frame, where start [B, T] is true."""
    return torch.where(start[..., None], 0.0, x - before)


def episode_mask(start: Tensor, window: int) -> Tensor:
    """Which frames a frame attends to: the last `window` of its episode, itself included. start bool [B, T] -> bool [B, T, T]."""
    episode = start.cumsum(1)
    time = torch.arange(start.shape[1], device=start.device)
    age = time[:, None] - time[None, :]
    return (episode[:, :, None] == episode[:, None, :]) & (age >= 0) & (age < window)


def grid_coordinates(grid: int) -> Tensor:
    """(x, y) of each cell's centre as a share of the image: [2, grid, grid]."""
    middle = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return torch.stack([x, y])


def grid_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2D sine-cosine position code of a grid, float32 [height * width, dim]; `dim` is a multiple of 4."""
    if dim % 4:
        raise ValueError(f"grid_positions: dim is {dim}, expected a multiple of 4")
    frequency = 100.0 ** -torch.linspace(0, 1, dim // 4)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.stack([row.flatten(), column.flatten()], 1)[..., None] * frequency  # [N, 2, dim/4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotate_by_time(x: Tensor, begin: int = 0) -> Tensor:
    """Rotary position embedding over the time axis of x [B, heads, T, head_dim], from time `begin` on (Su et al., arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    exact = full_precision(x[:0]).dtype  # angles of late frames need more digits than bf16 has
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = torch.arange(begin, begin + x.shape[-2], device=x.device, dtype=exact)[:, None] * frequency  # [T, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, x[..., 2 * half :]], dim=-1)


class MLP(nn.Sequential):
    """Linear - SiLU - ... - Linear over the last axis; `widths` lists every width from input to output."""

    def __init__(self, *widths: int):
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            layers += [nn.SiLU()] * (i > 0) + [nn.Linear(a, b)]
        super().__init__(*layers)


@torch.no_grad()
def emphasise_last(linear: nn.Linear, count: int) -> None:
    """Scales up the weights of the last `count` inputs of a new layer, so that their variance equals that of all others together.

    An action is one or a few numbers beside hundreds of others; a short training would not learn to use it.
    """
    linear.weight[:, -count:] *= ((linear.in_features - count) / count) ** 0.5


@torch.no_grad()
def near_zero(linear: nn.Linear) -> nn.Linear:
    """Scales a new last layer down, so that it says nearly nothing until it has learnt; returns it."""
    linear.weight *= 0.01
    linear.bias.zero_()
    return linear


class Attention(nn.Module):
    """Multi-head attention of x [B, N, D] over `memory` [B, M, Dm] (or x itself); `rotary` adds positions in time.

    A mask is bool, or is added to the logits: [B, N or 1, M].
    """

    def __init__(self, dim: int, heads: int = 4, memory_dim: int | None = None, rotary: bool = False):
        super().__init__()
        if dim % heads:
            raise ValueError(f"Attention: width {dim} is not a multiple of {heads} heads")
        self.heads, self.rotary = heads, rotary
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(memory_dim or dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self._mix(x, self.key_value(x if memory is None else memory), mask)

    def extend(self, x: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of T further frames x [B, T, D] over themselves and P cached frames before them.

        Args: past [B, P, 2 D], cached keys and values; mask bool [B, T, P + T].

        Returns: (output [B, T, D], keys and values of the last P frames [B, P, 2 D]).
        """
        key_value = torch.cat([past, self.key_value(x)], dim=1)
        return self._mix(x, key_value, mask), key_value[:, x.shape[1] :]

    def _mix(self, x: Tensor, key_value: Tensor, mask: Tensor | None) -> Tensor:
        split = "b n (h d) -> b h n d"
        query = rearrange(self.query(x), split, h=self.heads)
        key, value = (rearrange(t, split, h=self.heads) for t in key_value.chunk(2, -1))
        if self.rotary:  # only distances count: cached keys are not rotated and time begins at the oldest, so angles stay small
            query, key = rotate_by_time(query, key.shape[-2] - query.shape[-2]), rotate_by_time(key)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask[:, None])
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP. With `memory_dim` the attention reads a memory instead of x itself."""

    def __init__(self, dim: int, heads: int = 4, hidden_dim: int | None = None, memory_dim: int | None = None, rotary: bool = False):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim)
        self.norm_memory = nn.LayerNorm(memory_dim) if memory_dim else None
        self.attention = Attention(dim, heads, memory_dim, rotary)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim or 4 * dim), nn.GELU(), nn.Linear(hidden_dim or 4 * dim, dim))

    def forward(self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.norm_memory is not None:
            memory = self.norm_memory(memory)
        x = x + self.attention(self.norm_attention(x), memory, mask)
        return x + self.mlp(self.norm_mlp(x))

    def extend(self, x: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` for T further frames x [B, T, D] after the cached ones, see `Attention.extend`."""
        mixed, past = self.attention.extend(self.norm_attention(x), past, mask)
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x)), past


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm with groups of at least 4 channels, 8 groups at most, then SiLU; statistics are of one frame, so time stays causal.

    The dtype of x stays, also under autocast, where convolutions give bf16 and `nn.GroupNorm` would return fp32.
    """

    def __init__(self, channels: int):
        super().__init__(next(g for g in (8, 4, 2, 1) if (channels % g == 0 and channels // g >= 4) or g == 1), channels)

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> the same
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class ResidualCell(nn.Module):
    """NVAE's residual cell (Vahdat and Kautz, arXiv 2007.03898): (norm - swish - conv 3x3) twice, squeeze-excite, scaled sum.

    GroupNorm stands for NVAE's batch norm, so that a frame's features depend on that frame alone.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.branch = nn.Sequential(
            GroupNormSiLU(channels), nn.Conv2d(channels, channels, 3, padding=1),
            GroupNormSiLU(channels), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip
        squeezed = max(channels // 8, 4)
        self.excite = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> the same
        y = self.branch(x)
        gate = self.excite(y.mean((2, 3)))[:, :, None, None]
        return x + 0.5 * gate * y  # gate starts at 0.5; with the factor 0.5 the variance of the sum stays that of x


def downsample(inputs: int, outputs: int) -> nn.Conv2d:
    """Halves a grid, rounding up: 84 -> 42 -> 21 -> 11."""
    return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)


class ToPatches(nn.Module):
    """Reads a frame in patches of 4x4 pixels, each by one linear map: [N, 3, H, W] -> [N, C, ceil(H/4), ceil(W/4)].

    Nothing runs at H or H/2, where a small model spends most of its time on few channels; what a patch shows is told apart by the next
    convolution. A frame of another size is completed with zeros.

    Args: outputs: C.
    """

    def __init__(self, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(3, outputs, PATCH, stride=PATCH)

    def forward(self, frames: Tensor) -> Tensor:
        missing = -frames.shape[-1] % self.conv.stride[0]
        frames = F.pad(frames, (0, missing, 0, missing)) if missing else frames
        return self.conv(frames.contiguous(memory_format=torch.channels_last))


class FromPatches(nn.Module):
    """The mirror of `ToPatches`: each place becomes a patch of 4x4 pixels: [N, C, ceil(H/4), ceil(H/4)] -> [N, P, H, H]."""

    def __init__(self, inputs: int, outputs: int, image_size: int):
        super().__init__()
        self.size, self.linear = image_size, nn.Linear(inputs, outputs * PATCH**2)

    def forward(self, x: Tensor) -> Tensor:
        pixels = rearrange(self.linear(x.permute(0, 2, 3, 1)), "n h w (i j c) -> n (h i) (w j) c", i=PATCH, j=PATCH)
        return pixels[:, : self.size, : self.size].permute(0, 3, 1, 2)  # channels last in memory


class Upsample(nn.Module):
    """Doubles a grid by a transposed convolution, then crops to `size`: 11 -> 21 -> 42 -> 84.

    Of its 4x4 taps each output reads 2x2: four ninths of the operations of a sub-pixel convolution of 3x3 taps.
    """

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., : self.size, : self.size]


def halvings(size: int, levels: int) -> list[int]:
    """Grid sizes at each level, rounding up: halvings(84, 3) is [84, 42, 21, 11]."""
    sizes = [size]
    for _ in range(levels):
        sizes.append((sizes[-1] + 1) // 2)
    return sizes
