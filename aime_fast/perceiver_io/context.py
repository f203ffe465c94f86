"""CausalPerceiverIO: tokens -> one context vector a frame, never looking ahead.

Learned latents read the tokens of a frame (Perceiver IO; Jaegle et al., arXiv 2107.14795), a dense layer reads them beside these, and a
causal transformer with rotary positions mixes frames. A frame attends at most `window` frames back, as in training, so that longer videos
need nothing that was not learnt.
`observe` continues from a `PerceptionCache` of fixed size: frames may come one by one, at the cost of one frame each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aime_fast.config import Compile, ModelConfig
from aime_fast.layers import DELTA_SCALE, TransformerBlock, episode_mask, full_precision, grid_positions, starts
from aime_fast.perceiver_io.predictor import PerceiverTokenPredictor
from aime_fast.perceiver_io.tokenizer import Tokens, VQPTTokenizer
from aime_fast.runtime import ranks
from aime_fast.runtime.roll_out import RollOut, match_layout
from aime_fast.runtime.spans import span

MEAN_DECAY = 0.9  # an update of `mean_code` and `mean_context`: as fast as the codebook moves at first


class ContextCache(NamedTuple):
    """Keys and values of attention over time, of the last window - 1 frames, oldest first."""

    key_value: Tensor  # [B, layers, window - 1, 2 D], keys not yet rotated
    known: Tensor  # bool [B, window - 1], entries that belong to a frame of this episode


class PerceptionCache(NamedTuple):
    """What perception caches between frames."""

    convolutions: tuple[Tensor, ...]  # [B, C, h, w] each, `Tokens.cache`
    context: ContextCache


class CausalPerceiverIO(nn.Module):
    """The perception pillar: tokenizer, context and next-token predictor.

    Args:
        video_shape: (T, 3, H, W); T is the window of the temporal attention.
        num_latents, num_latent_channels: latent queries of a frame and their width.
        hidden_dim: width inside the MLPs.
        context_dim: Dc.
        action_dim: A, for the predictor.
        latent_dim: Z, for `recall_loss`.
        tokenizer, predictor: further keywords of `VQPTTokenizer` and `PerceiverTokenPredictor`.

    The tokenizer is trained by its own reconstruction and commitment alone: context and predictor read discrete codes. The context is
    trained by the ELBO, by `recall_loss`, and by the tokens of sequences of which the predictor is given nothing else. By those alone
    that it predicts from tokens of this frame too it stayed a constant: it can add little, and hardly any gradient came back
    (docs/log.md).

    `mean_code` [Ht * Wt, Q * d], a moving average of the code vectors of each place, is taken off what the context reads.
    `mean_context` [Dc], of contexts, is that of a frame that nobody has seen.
    """

    def __init__(
        self,
        video_shape: tuple[int, int, int, int] = (16, 3, 64, 64),
        num_latents: int = ModelConfig.num_latents,
        num_latent_channels: int = ModelConfig.num_latent_channels,
        hidden_dim: int = 2 * ModelConfig.num_latent_channels,
        context_dim: int = ModelConfig.context_dim,
        action_dim: int = 6,
        latent_dim: int = ModelConfig.latent_dim,
        context_layers: int = ModelConfig.context_layers,
        tokenizer: dict | None = None,
        predictor: dict | None = None,
    ):
        super().__init__()
        frames, channels, height, width = video_shape
        if channels != 3 or height != width:
            raise ValueError(f"video_shape is {video_shape}, expected (T, 3, H, H)")
        self.window, self.context_dim = frames, context_dim
        self.tokenizer = VQPTTokenizer(height, **(tokenizer or {}))
        quantizer, grid, dim = self.tokenizer.quantizer, self.tokenizer.grid, num_latent_channels
        self.embed = nn.Linear(self.tokenizer.width, dim)
        self.register_buffer("positions", grid_positions(grid, grid, dim), persistent=False)
        self.register_buffer("mean_code", torch.zeros(grid**2, self.tokenizer.width))
        self.register_buffer("mean_context", torch.zeros(context_dim))
        self.dense = nn.Linear(self.mean_code.numel(), dim)
        self.latents = nn.Parameter(torch.randn(num_latents, dim) * dim**-0.5)
        self.read = TransformerBlock(dim, hidden_dim=hidden_dim, memory_dim=dim)
        self.think = TransformerBlock(dim, hidden_dim=hidden_dim)
        self.time = nn.ModuleList(TransformerBlock(dim, hidden_dim=hidden_dim, rotary=True) for _ in range(context_layers))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, context_dim))
        self.recall = nn.Linear(context_dim, 2 * latent_dim)
        self.predictor = PerceiverTokenPredictor(
            grid, quantizer.heads, quantizer.codebook_size, context_dim, action_dim, **(predictor or {})
        )
        self.roll_out = RollOut(next_tokens)

    def context(self, tokens: Tensor, start: Tensor) -> Tensor:
        """tokens int64 [B, T, Ht, Wt, Q], start bool [B, T] -> context [B, T, Dc]; c_t depends on frames <= t of the same episode."""
        x, mask = self._summarise(tokens), episode_mask(start, self.window)
        for block in self.time:
            x = block(x, mask=mask)
        return self.out(x)

    def extend_context(self, tokens: Tensor, cache: ContextCache, is_init: Tensor | None = None) -> tuple[Tensor, ContextCache]:
        """`context` of T further frames, one or many, after the cached ones. Returns (context [B, T, Dc], the next cache).

        `is_init` bool [B, T] marks first frames of an episode; without it all frames continue that of the cache.
        """
        batch, frames = tokens.shape[:2]
        past = cache.known.shape[1]
        start = F.pad(starts(is_init, batch, frames, tokens.device, first=False), (past, 0))  # [B, past + T]
        known = F.pad(cache.known, (0, frames), value=True)
        mask = episode_mask(start, self.window)[:, past:] & known[:, None]  # [B, T, past + T]
        x, key_value = self._summarise(tokens), []
        for block, old in zip(self.time, cache.key_value.unbind(1)):
            x, new = block.extend(x, old, mask)
            key_value.append(new)
        episode = start.cumsum(1)
        known = known & (episode == episode[:, -1:])
        return self.out(x), ContextCache(torch.stack(key_value, dim=1), known[:, frames:].contiguous())

    def empty_cache(self, batch: int) -> PerceptionCache:
        """The cache before a first frame."""
        past, width, like = self.window - 1, 2 * self.latents.shape[1], self.latents
        context = ContextCache(
            torch.zeros(batch, len(self.time), past, width, device=like.device, dtype=like.dtype),
            torch.zeros(batch, past, dtype=torch.bool, device=like.device),
        )
        return PerceptionCache(self.tokenizer.empty_cache(batch), context)

    def _summarise(self, tokens: Tensor) -> Tensor:
        """One vector for each frame, of that frame alone: int64 [B, T, Ht, Wt, Q] -> [B, T, D].

        Tokens are attended to by how rare their codes are: in a mean over the picture the few that change would vanish. The dense layer
        sees each at its place, so that it can tell patterns of several, as a pole at an angle is.
        """
        rarity = self.tokenizer.quantizer.surprise(tokens).flatten(2).flatten(0, 1).unsqueeze(1)  # [B * T, 1, Ht * Wt]
        centred = rearrange(self.tokenizer.embed(tokens), "b t h w c -> (b t) (h w) c") - self.mean_code
        memory = self.embed(centred) + self.positions
        latents = self.read(self.latents.expand(memory.shape[0], -1, -1), memory, rarity.to(memory.dtype))
        return (self.think(latents).mean(1) + self.dense(centred.flatten(1))).unflatten(0, tokens.shape[:2])

    def recall_loss(self, context: Tensor, means: Tensor, delta: Tensor) -> Tensor:
        """Mean squared error of latents and scaled delta, [B, T, Z] each, without gradient, read linearly from context [B, T, Dc]."""
        told = torch.cat([means, DELTA_SCALE * delta], dim=-1).detach()
        return F.mse_loss(full_precision(self.recall(context)), full_precision(told))

    def score(
        self,
        video: Tensor,
        tokens: Tokens,
        context: Tensor,
        actions: Tensor,
        start: Tensor,
        few: slice,
        means: Tensor,
        delta: Tensor,
        own_tokens: Tensor | float = 0.0,
        pictures: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms of the perceiver task; in training codebook and mean code then learn: context and decoder have read the old ones.

        Args: video [B, T, 3, H, W] in [-1, 1], actions [B, T, A], start bool [B, T]; tokens of all sequences or of the first few; context
            [B, T, Dc]; few: the sequences that are tokenised back and predicted; means, delta [B, T, Z]: see `recall_loss`; own_tokens,
            see `PerceiverTokenPredictor.loss`; pictures [B or less, T, 3, H, W] of the few, drawn by the decoder.

        Returns: scalars: commitment, token_reconstruction, next_token, token_accuracy, context_recall.
        """
        terms = {"commitment": tokens.commitment}
        with span("perceiver_io: tokenizer decoder"):
            from_tokens = self.tokenizer.decode_vectors(tokens.quantized[few], start[few])
            terms["token_reconstruction"] = F.mse_loss(full_precision(from_tokens), video[few])
        with span("perceiver_io: tokenizer"), torch.no_grad():
            drawn = None if pictures is None else self.tokenizer.tokenize(pictures.clamp(-1, 1), start[few]).codes
        if self.training:
            self.learn(tokens)
        with span("perceiver_io: predictor"):
            terms["next_token"], terms["token_accuracy"] = self.predictor.loss(
                tokens.codes[few], context[few], actions[few], start[few], own_tokens, self.context, drawn
            )
        with span("perceiver_io: recall"):
            terms["context_recall"] = self.recall_loss(context, means, delta)
        return terms

    def learn_context(self, context: Tensor) -> None:
        """Update the mean context by those of a batch, [B, T, Dc]. Imagined frames read it, perhaps on another stream than `score`."""
        self.mean_context.lerp_(ranks.mean(context.detach().mean((0, 1))).to(self.mean_context.dtype), 1 - MEAN_DECAY)

    def learn(self, tokens: Tokens) -> None:
        """Update codebook and mean code by the tokens of a batch, when nothing reads the old ones any more."""
        vectors = self.tokenizer.embed(tokens.codes).flatten(2, 3).flatten(0, 1)
        self.mean_code.lerp_(ranks.mean(vectors.mean(0)).to(self.mean_code.dtype), 1 - MEAN_DECAY)
        self.tokenizer.learn(tokens)

    def extract_context(self, video: Tensor, is_init: Tensor | None = None) -> Tensor:
        """video [B, T, 3, H, W], uint8 or in [-1, 1] -> context [B, T, Dc]."""
        tokens, _, _ = self.tokenizer.encode(video, is_init)
        return self.context(tokens, starts(is_init, *video.shape[:2], video.device))

    forward = extract_context

    def observe(self, video: Tensor, cache: PerceptionCache, is_init: Tensor) -> tuple[Tensor, Tensor, PerceptionCache]:
        """Tokens and context of T further frames, one or many, after the cached ones.

        Args: video [B, T, 3, H, W] in [-1, 1]; cache, `empty_cache` before a first frame; is_init bool [B, T].

        Returns: (tokens int64 [B, T, Ht, Wt, Q], context [B, T, Dc], the next cache).
        """
        tokens = self.tokenizer.tokenize(video, is_init, cache.convolutions)
        context, context_cache = self.extend_context(tokens.codes, cache.context, is_init)
        return tokens.codes, context, PerceptionCache(tokens.cache, context_cache)

    def compile_generation(self, mode: Compile = "on") -> None:
        """How `generate_tokens` runs a frame, see `RollOut`."""
        self.roll_out = RollOut(next_tokens, mode)

    @torch.no_grad()
    def generate_tokens(
        self, tokens: Tensor, actions: Tensor, num_frames: int, temperature: float = 1.0, top_p: float = 1.0, drawn: Tensor | None = None
    ) -> Tensor:
        """Rolls the predictor out on its own tokens: int64 [B, Tc, Ht, Wt, Q] -> [B, num_frames, Ht, Wt, Q].

        `actions` [B, >= Tc + num_frames - 1, A] holds the actions of the given frames and of all generated frames but the last;
        `drawn` int64 [B, num_frames, Ht, Wt, Q] the tokens of pictures imagined of the generated frames, such as `predict_future` gives.
        Raises ValueError when there are fewer of either.
        """
        batch, given = tokens.shape[:2]
        if actions.shape[1] < given + num_frames - 1:
            raise ValueError(
                f"generate_autoregressive: {num_frames} frames after {given} need {given + num_frames - 1} actions, got {actions.shape[1]}"
            )
        if drawn is not None and drawn.shape[1] != num_frames:
            raise ValueError(f"generate_tokens: {num_frames} frames need drawn tokens of as many, got {drawn.shape[1]}")
        context, cache = self.extend_context(tokens, self.empty_cache(batch).context)
        state = tokens[:, -1].clone(), context[:, -1].clone(), cache
        used = actions[:, given - 1 : given + num_frames - 1]
        return self.roll_out(self, used if drawn is None else (used, drawn), state, temperature, top_p)[0]

    @torch.no_grad()
    def generate_autoregressive(
        self, video: Tensor, actions: Tensor, num_frames: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> Tensor:
        """Continues video [B, Tc, 3, H, W], uint8 or in [-1, 1], to [B, num_frames, 3, H, W]; see `generate_tokens`."""
        given, _, _ = self.tokenizer.encode(video)
        future = self.generate_tokens(given, actions, num_frames, temperature, top_p)
        return self.tokenizer.decode(torch.cat([given, future], dim=1))[:, given.shape[1] :]


def next_tokens(
    perceiver: CausalPerceiverIO,
    given: Tensor | tuple[Tensor, Tensor],
    state: tuple[Tensor, Tensor, ContextCache],
    temperature: float,
    top_p: float,
) -> tuple[Tensor, tuple[Tensor, Tensor, ContextCache]]:
    """One frame of generation: the predictor samples tokens, the context reads them.

    Args: given: action [B, A], alone or with the tokens int64 [B, Ht, Wt, Q] of an imagined picture; state of the frame before: its tokens
    [B, Ht, Wt, Q], its context [B, Dc], the cache.

    Returns: (tokens int64 [B, Ht, Wt, Q] of the next frame, the next state).
    """
    tokens, context, cache = state
    action, drawn = given if isinstance(given, tuple) else (given, None)
    tokens = perceiver.predictor.sample(tokens, context, action, temperature, top_p, drawn)
    context, cache = perceiver.extend_context(tokens[:, None], cache)
    return tokens, match_layout((tokens, context[:, 0], cache), state)
