"""PerceiverTokenPredictor: tokens of the next frame from those of this frame, the context and the action."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from aime_fast.config import ModelConfig
from aime_fast.layers import MLP, Attention, emphasise_last, full_precision, grid_positions
from aime_fast.runtime import ranks

PICTURED = 0.75  # share of the training sequences whose tokens are predicted given those of a picture


class ConditionedBlock(nn.Module):
    """Transformer block whose norms are scaled and shifted by a condition (adaLN-zero; Peebles and Xie, arXiv 2212.09748)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, elementwise_affine=False)
        self.norm_mlp = nn.LayerNorm(dim, elementwise_affine=False)
        self.attention = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.modulation = nn.Linear(dim, 4 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # [N, M, D], [N, D] -> [N, M, D]
        scale_a, shift_a, scale_m, shift_m = self.modulation(F.silu(condition))[:, None].chunk(4, dim=-1)
        x = x + self.attention(self.norm_attention(x) * (1 + scale_a) + shift_a)
        return x + self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m)


class PerceiverTokenPredictor(nn.Module):
    """p(tokens of frame t+1 | tokens of frame t, c_t, a_t), and the same given the tokens of a picture of frame t+1 that the world model
    has drawn.

    One network is both: in training a share `PICTURED` of the shown sequences has pictures, reconstructions, in a roll-out imagined ones.
    Where a thing moves to is what latents are good at predicting.

    With `refinement_steps > 0` it is also given a part of the target in training, and samples in that many rounds, the most probable
    tokens first (MaskGIT; Chang et al., arXiv 2202.04200). Otherwise all tokens of a frame are sampled at once.

    Args:
        grid: Ht = Wt.
        corruption: share of input tokens replaced by random codes in training, against exposure bias.
        hidden_share: of the training sequences, those of which neither tokens of frame t nor drawn ones are shown, only c_t.
    """

    def __init__(
        self,
        grid: int,
        codebook_heads: int,
        codebook_size: int,
        context_dim: int,
        action_dim: int,
        dim: int = ModelConfig.predictor_dim,
        layers: int = ModelConfig.predictor_layers,
        corruption: float = ModelConfig.token_corruption,
        hidden_share: float = ModelConfig.hidden_tokens,
        refinement_steps: int = ModelConfig.refinement_steps,
    ):
        super().__init__()
        self.grid, self.heads, self.codes = grid, codebook_heads, codebook_size
        self.corruption, self.hidden_share, self.refinement_steps = corruption, hidden_share, refinement_steps
        self.mask_token = codebook_size
        self.current = nn.Embedding(codebook_heads * codebook_size, dim)
        self.drawn = nn.Embedding(codebook_heads * codebook_size, dim)
        self.partial = nn.Embedding(codebook_heads * (codebook_size + 1), dim) if refinement_steps else None
        for table in (self.current, self.drawn):
            nn.init.normal_(table.weight, std=dim**-0.5)
        self.positions = nn.Parameter(grid_positions(grid, grid, dim) * 0.5)
        self.condition = MLP(context_dim + action_dim, dim, dim)
        emphasise_last(self.condition[0], action_dim)
        self.blocks = nn.ModuleList(ConditionedBlock(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.logits = nn.Linear(dim, codebook_heads * codebook_size)
        self.stay = nn.Linear(dim, codebook_heads)  # added to the logit of the present code: most of a video does not change
        self.follow = nn.Linear(dim, codebook_heads)  # added to that of the drawn code
        for favour, bias in ((self.stay, 3.0), (self.follow, 5.0)):  # what is drawn elsewhere has moved there
            nn.init.zeros_(favour.weight)
            nn.init.constant_(favour.bias, bias)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        actions: Tensor,
        partial: Tensor | None = None,
        drawn: Tensor | None = None,
        shown: Tensor | None = None,
        pictured: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next frame's tokens.

        Args:
            tokens: int64 [B, T, Ht, Wt, Q], frame t.
            context: [B, T, Dc], c_t.
            actions: [B, T, A], a_t.
            partial: int64 [B, T, Ht, Wt, Q], known tokens of frame t+1; `mask_token` where unknown.
            drawn: int64 [B, T, Ht, Wt, Q], tokens of pictures of frame t+1.
            shown, pictured: bool [B], false for a sequence whose tokens, or drawn tokens, are hidden; None shows all.

        Returns:
            [B, T, Ht, Wt, Q, V] for frame t+1.
        """
        batch, frames = tokens.shape[:2]
        given = [(self.current, self.stay, tokens, shown)] + ([] if drawn is None else [(self.drawn, self.follow, drawn, pictured)])
        x = self.positions
        for table, _, codes, visible in given:
            x = x + _where(visible, self._embed(table, codes, self.codes))
        if self.partial is not None:
            known = torch.full_like(tokens, self.mask_token) if partial is None else partial
            x = x + self._embed(self.partial, known, self.codes + 1)
        condition = self.condition(torch.cat([context, actions.to(context.dtype)], dim=-1)).flatten(0, 1)
        for block in self.blocks:
            x = block(x, condition)
        x = self.norm(x)
        shape = dict(b=batch, t=frames, h=self.grid, w=self.grid, q=self.heads)
        logits = rearrange(self.logits(x), "(b t) (h w) (q v) -> b t h w q v", **shape)
        for _, favour, codes, visible in given:
            more = rearrange(_where(visible, favour(x)), "(b t) (h w) q -> b t h w q 1", **shape)
            logits = logits.scatter_add(-1, codes.unsqueeze(-1), more)
        return logits

    def loss(
        self,
        tokens: Tensor,
        context: Tensor,
        actions: Tensor,
        start: Tensor,
        own_tokens: Tensor | float = 0.0,
        context_of: Callable[[Tensor, Tensor], Tensor] | None = None,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced cross-entropy (nats a token) and accuracy of frames 1..T-1; a frame after a cut is not predicted.

        In training, a share `own_tokens` of the input frames is what the model itself predicts for them from the frame before
        (scheduled sampling; Bengio et al., arXiv 1506.03099), `corruption` of the input tokens are random codes, and of a share
        `hidden_share` of the sequences neither tokens nor drawn ones are shown. The context is computed from these inputs too: that of the
        true tokens would tell what was replaced.

        Args: tokens int64 [B, T, Ht, Wt, Q]; context [B, T, Dc]; actions [B, T, A]; start bool [B, T]; own_tokens in [0, 1]; context_of:
            (tokens, start) -> context, used in training; None takes the given context; drawn int64 [B, T, Ht, Wt, Q], tokens of pictures of
            the same frames, of which in training a share is used.
        """
        given, target, context = tokens[:, :-1], tokens[:, 1:], context[:, :-1]
        partial = shown = pictured = None
        weight = (~start[:, 1:])[..., None, None, None].expand(target.shape).to(context.dtype)
        drawn = None if drawn is None else drawn[:, 1:]
        if self.training:
            shown = ranks.rand(len(given), device=given.device) >= self.hidden_share
            if drawn is not None:
                pictured = shown & (ranks.rand(len(given), device=given.device) < PICTURED)
            if isinstance(own_tokens, Tensor) or own_tokens > 0:
                given = self._mix_in_own(given, context, actions, start, own_tokens, drawn, pictured)
            noise = ranks.rand(*given.shape, device=tokens.device)
            others = ranks.draw(lambda whole: torch.randint(self.codes, whole, device=tokens.device), given.shape)
            given = torch.where(noise < self.corruption, others, given)
            if context_of is not None:
                context = context_of(given, start[:, :-1])
            if self.partial is not None:
                ratio = torch.cos(0.5 * math.pi * ranks.rand(*target.shape[:2], device=tokens.device))
                masked = ranks.rand(*target.shape, device=tokens.device) < ratio[..., None, None, None]
                partial = torch.where(masked, self.mask_token, target)
                weight = weight * masked
        logits = full_precision(self(given, context, actions[:, :-1], partial, drawn, shown, pictured))
        total = ranks.mean(weight.sum()).clamp_min(1.0 / ranks.size())
        nll = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
        accuracy = (logits.detach().argmax(-1) == target).to(weight.dtype)
        return (nll * weight.flatten()).sum() / total, (accuracy * weight).sum() / total

    @torch.no_grad()
    def _mix_in_own(
        self,
        given: Tensor,
        context: Tensor,
        actions: Tensor,
        start: Tensor,
        share: Tensor | float,
        drawn: Tensor | None = None,
        pictured: Tensor | None = None,
    ) -> Tensor:
        """Frames 1.. of `given` [B, T-1, ...], each with probability `share` replaced by the likeliest tokens after the one before."""
        length = given.shape[1]
        if length < 2:
            return given
        drawn = None if drawn is None else drawn[:, : length - 1]
        context = context[:, : length - 1].detach()
        own = self(given[:, :-1], context, actions[:, : length - 1], None, drawn, None, pictured).argmax(-1)
        chosen = (ranks.rand(*own.shape[:2], device=own.device) < share) & ~start[:, 1:length]
        return torch.cat([given[:, :1], torch.where(chosen[..., None, None, None], own, given[:, 1:])], dim=1)

    def sample(
        self, tokens: Tensor, context: Tensor, actions: Tensor, temperature: float = 1.0, top_p: float = 1.0, drawn: Tensor | None = None
    ) -> Tensor:
        """Samples the next frame: int64 [B, Ht, Wt, Q] from tokens [B, Ht, Wt, Q], context [B, Dc], actions [B, A] and drawn, the tokens
        [B, Ht, Wt, Q] of pictures imagined of that frame, where there are any.

        `temperature=0` takes the likeliest code.
        """
        given = tokens[:, None], context[:, None], actions[:, None]
        drawn = None if drawn is None else drawn[:, None]
        if self.partial is None:
            return sample_codes(self(*given, None, drawn)[:, 0], temperature, top_p)
        partial = torch.full_like(given[0], self.mask_token)
        for i in range(self.refinement_steps):
            logits = self(*given, partial, drawn)
            guess = torch.where(partial == self.mask_token, sample_codes(logits, temperature, top_p), partial)
            confidence = full_precision(logits).log_softmax(-1).gather(-1, guess[..., None])[..., 0]
            confidence = torch.where(partial == self.mask_token, confidence, torch.inf).flatten(1)
            masked = int(confidence.shape[1] * math.cos(0.5 * math.pi * (i + 1) / self.refinement_steps))
            rank = confidence.argsort(1).argsort(1).view_as(guess)
            partial = torch.where(rank < masked, self.mask_token, guess)
        return partial[:, 0]

    def _embed(self, table: nn.Embedding, tokens: Tensor, size: int) -> Tensor:
        """Sum over the heads of one embedding a head: int64 [B, T, Ht, Wt, Q] -> [B*T, Ht*Wt, D]."""
        offset = torch.arange(self.heads, device=tokens.device) * size
        return rearrange(table(tokens + offset).sum(-2), "b t h w d -> (b t) (h w) d")


def _where(visible: Tensor | None, x: Tensor) -> Tensor:
    """x [B * T, ...] where its sequence is visible, bool [B]; elsewhere 0."""
    if visible is None:
        return x
    return torch.where(visible.repeat_interleave(len(x) // len(visible)).view(-1, *(1,) * (x.dim() - 1)), x, 0.0)


def sample_codes(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Samples codes from logits [..., V] -> int64 [...]; nucleus sampling takes the most probable codes up to `top_p`.

    Raises ValueError for a negative temperature or a `top_p` outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"sampling: temperature {temperature} must be >= 0 and top_p {top_p} in (0, 1]")
    logits = full_precision(logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(mass_before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, index, ordered)
    gumbel = -torch.empty_like(logits).exponential_().log()
    return (logits + gumbel).argmax(-1)
