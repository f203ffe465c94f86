"""Updates of the perceiver alone, on the sequences that come with the single frames of every other picture step.

Tokens that change with every update are hard to predict. So tokenizer, context and token predictor begin with the pictures, and are far
on when encoder, recurrence and priors first read the context (docs/log.md). What the decoder will draw of a frame is not known yet: the
predictor is given no pictures, and the context recalls latents that the encoder infers without one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aime_fast.layers import delta_from, previous, starts
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.multi_task_learning.loss_aggregator import TERMS
from aime_fast.runtime import ranks
from aime_fast.runtime.spans import span
from aime_fast.training.adam import Adam, clip_factor
from aime_fast.training.arena import Arena, GradientRows

GRADIENT_NORM = "gradient_norm/perception"


def score_perception(model: nn.Module, video: Tensor, actions: Tensor, start: Tensor) -> dict[str, Tensor]:
    """The terms of the perceiver task, see `CausalPerceiverIO.score`; the codebook learns.

    The tokenizer too sees the `auxiliary_share` of the sequences; the context, which costs less, learns from all.

    Args: video [B, T, 3, H, W] in [-1, 1]; actions [B, T, A]; start bool [B, T].
    """
    perceiver, few = model.perceiver_io, model.few(len(start))
    others = slice(few.stop, None)
    with span("perceiver_io: tokenizer"):
        tokens = perceiver.tokenizer.tokenize(video[few], start[few], learn=True)
        with torch.no_grad():
            codes = torch.cat([tokens.codes, perceiver.tokenizer.tokenize(video[others], start[others]).codes])
    with span("perceiver_io: context"):
        context = perceiver.context(codes, start)
    with span("encoder_decoder: encoder"), torch.no_grad():
        means = model.encoder(video.flatten(0, 1), torch.zeros_like(context).flatten(0, 1)).mean.unflatten(0, start.shape)
    delta = delta_from(previous(means, start), means, start)
    perceiver.learn_context(context)
    return perceiver.score(video, tokens, context, actions, start, few, means, delta)


class PerceptionUpdates:
    """Adam on the perceiver.

    Args:
        model: whose `perceiver_io` has the last parameters of `generator`.
        generator: arena of the model.
        losses: weighs the terms.
        learning_rate_scale: of the perceiver.
        clip: largest gradient norm.
        beta1: of Adam.
    """

    def __init__(self, model: nn.Module, generator: Arena, losses: LossAggregator, learning_rate_scale: float, clip: float, beta1: float):
        self.model, self.losses, self.learning_rate_scale, self.clip = model, losses, learning_rate_scale, clip
        self.arena = generator.part(slice(-sum(1 for _ in model.perceiver_io.parameters()), None))
        self._row = GradientRows(self.arena, 1)
        self._learnt = list(model.perceiver_io.buffers())
        self.optimizer = Adam(self.arena.flat, beta1)

    def __call__(
        self, video: Tensor, actions: Tensor, is_init: Tensor, learning_rate: Tensor, autocast: torch.autocast
    ) -> dict[str, Tensor]:
        """An update from frames [B, T, 3, H, W] in [-1, 1]; it is not made where its gradient is not finite.

        Args: actions [B, T, A]; is_init bool [B, T, 1]; learning_rate: scalar tensor, before it is scaled.

        Returns: by name, `loss/` each term and `loss/perceiver`, `GRADIENT_NORM`.
        """
        before = [buffer.clone() for buffer in self._learnt]
        with autocast:
            terms = score_perception(self.model, video, actions, starts(is_init, *video.shape[:2], video.device))
        terms = {name: term for name, term in terms.items() if name in TERMS}
        loss = self.losses.perceiver(terms)
        gradient = ranks.average_(self._row.gather({"perception": loss})[0])
        norm = torch.linalg.vector_norm(gradient)
        made = torch.isfinite(norm)
        self.optimizer.update(gradient * clip_factor(norm, self.clip), learning_rate * self.learning_rate_scale, made)
        for buffer, old in zip(self._learnt, before):
            buffer.copy_(torch.where(made, buffer, old))
        return {f"loss/{name}": term.detach() for name, term in (terms | {"perceiver": loss}).items()} | {GRADIENT_NORM: norm}
