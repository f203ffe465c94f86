"""CausalPerceiverIO: tokens -> one context vector a frame, never looking ahead.

Learned latents read the tokens of a frame (Perceiver IO; Jaegle et al., arXiv 2107.14795); a causal transformer with rotary positions
mixes frames. Frames see at most `window` frames back, as in training, so that longer videos ask for nothing that was not learnt.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from aime_fast.layers import TransformerBlock, episode_mask, grid_positions, starts
from aime_fast.perceiver_io.predictor import PerceiverTokenPredictor
from aime_fast.perceiver_io.tokenizer import VQPTTokenizer


class CausalPerceiverIO(nn.Module):
    """The perception pillar: tokenizer, context and next-token predictor.

    Args:
        video_shape: (T, 3, H, W); T is the window of the temporal attention.
        num_latents, num_latent_channels: latent queries of a frame and their width.
        hidden_dim: width inside the MLPs.
        context_dim: Dc.
        action_dim: A, for the predictor.
        tokenizer, predictor: further keywords of `VQPTTokenizer` and `PerceiverTokenPredictor`.

    The tokenizer learns from its own reconstruction and commitment alone: context and predictor read codes, which are discrete.
    """

    def __init__(
        self,
        video_shape: tuple[int, int, int, int] = (16, 3, 64, 64),
        num_latents: int = 128,
        num_latent_channels: int = 256,
        hidden_dim: int = 512,
        context_dim: int = 256,
        action_dim: int = 6,
        context_layers: int = 2,
        tokenizer: dict | None = None,
        predictor: dict | None = None,
    ):
        super().__init__()
        frames, channels, height, width = video_shape
        if channels != 3 or height != width:
            raise ValueError(f"video_shape is {video_shape}, expected (T, 3, H, H)")
        self.window = frames
        self.tokenizer = VQPTTokenizer(height, **(tokenizer or {}))
        quantizer, grid, dim = self.tokenizer.quantizer, self.tokenizer.grid, num_latent_channels
        self.embed = nn.Linear(self.tokenizer.width, dim)
        self.register_buffer("positions", grid_positions(grid, grid, dim), persistent=False)
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * dim**-0.5)
        self.read = TransformerBlock(dim, hidden_dim=hidden_dim, memory_dim=dim)
        self.think = TransformerBlock(dim, hidden_dim=hidden_dim)
        self.time = nn.ModuleList(TransformerBlock(dim, hidden_dim=hidden_dim, rotary=True) for _ in range(context_layers))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, context_dim))
        self.predictor = PerceiverTokenPredictor(
            grid, quantizer.heads, quantizer.codebook_size, context_dim, action_dim, **(predictor or {})
        )

    @property
    def token_reach(self) -> int:
        """Frames of tokens that one context vector depends on, its own included."""
        return len(self.time) * (self.window - 1) + 1

    def context(self, tokens: Tensor, is_init: Tensor | None = None) -> Tensor:
        """tokens int64 [B, T, Ht, Wt, Q] -> context [B, T, Dc]; c_t depends on frames <= t of the same episode."""
        start = starts(is_init, *tokens.shape[:2], tokens.device)
        memory = self.embed(rearrange(self.tokenizer.embed(tokens), "b t h w c -> (b t) (h w) c")) + self.positions
        latents = self.read(self.latents.expand(memory.shape[0], -1, -1), memory)
        x = self.think(latents).mean(1).unflatten(0, tokens.shape[:2])  # [B, T, D]
        mask = episode_mask(start, self.window)
        for block in self.time:
            x = block(x, mask=mask)
        return self.out(x)

    def extract_context(self, video: Tensor, is_init: Tensor | None = None) -> Tensor:
        """video [B, T, 3, H, W] in [-1, 1] -> context [B, T, Dc]."""
        return self.context(self.tokenizer.tokenize(video, is_init).codes, is_init)

    forward = extract_context

    @torch.no_grad()
    def generate_tokens(self, tokens: Tensor, actions: Tensor, num_frames: int, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
        """Rolls the predictor out on its own tokens: int64 [B, Tc, Ht, Wt, Q] -> [B, num_frames, Ht, Wt, Q].

        `actions` [B, >= Tc + num_frames - 1, A] holds the actions of the given frames and of all generated frames but the last.
        Raises ValueError when there are fewer.
        """
        given = tokens.shape[1]
        if actions.shape[1] < given + num_frames - 1:
            raise ValueError(
                f"generate_autoregressive: {num_frames} frames after {given} need {given + num_frames - 1} actions, got {actions.shape[1]}"
            )
        for t in range(given - 1, given + num_frames - 1):
            recent = tokens[:, -self.token_reach :]
            following = self.predictor.sample(tokens[:, -1], self.context(recent)[:, -1], actions[:, t], temperature, top_p)
            tokens = torch.cat([tokens, following[:, None]], dim=1)
        return tokens[:, given:]

    @torch.no_grad()
    def generate_autoregressive(
        self, video: Tensor, actions: Tensor, num_frames: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> Tensor:
        """Continues video [B, Tc, 3, H, W] by `num_frames` frames, any number: [B, num_frames, 3, H, W]; see `generate_tokens`."""
        given = self.tokenizer.tokenize(video).codes
        future = self.generate_tokens(given, actions, num_frames, temperature, top_p)
        return self.tokenizer.decode(torch.cat([given, future], dim=1))[:, given.shape[1] :]
