"""Updates of perception alone, on sequences that come with the single frames of a picture step.

Tokens that change with every update are hard to predict. So tokenizer, context and token predictor begin with the pictures, and are far
on when encoder, recurrence and priors first read the context (docs/log.md). What is drawn of a frame is not known yet: the predictor sees
the frames themselves, and the context recalls latents that the encoder infers without one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aime_fast.layers import full_precision, previous, starts
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.runtime.spans import span
from aime_fast.training.adam import Adam, clip_factor
from aime_fast.training.arena import Arena, GradientRows

# Scalars of these updates, in the order of computation.
TOKENS = (
    *(f"loss/{name}" for name in ("commitment", "token_reconstruction", "next_token", "context_recall", "perceiver")),
    "gradient_norm/tokens",
)


def score_tokens(model: nn.Module, video: Tensor, actions: Tensor, start: Tensor) -> dict[str, Tensor]:
    """The terms of the perceiver task of frames [B, T, 3, H, W] in [-1, 1], actions [B, T, A], start bool [B, T]; the codebook learns.

    Tokenizer and predictor see a share of the sequences, as in joint updates; the context, which costs less, learns from all.
    """
    perceiver, shape, few = model.perceiver_io, start.shape, model.few(len(start))
    tokens = perceiver.tokenizer.tokenize(video[few], start[few], learn=True)
    from_tokens = perceiver.tokenizer.decode_vectors(tokens.quantized, start[few])
    with torch.no_grad():
        others = slice(few.stop, None)
        codes = torch.cat([tokens.codes, perceiver.tokenizer.tokenize(video[others], start[others]).codes])
    context = perceiver.context(codes, start)
    with torch.no_grad():
        means = model.encoder(video.flatten(0, 1), torch.zeros_like(context).flatten(0, 1)).mean.unflatten(0, shape)
        delta = torch.where(start[..., None], 0.0, means - previous(means, start))
    perceiver.learn(tokens)
    given = (x[few] for x in (context, actions, start))
    next_token, _ = perceiver.predictor.loss(tokens.codes, *given, 0.0, perceiver.context, video[few])
    return {
        "commitment": tokens.commitment,
        "token_reconstruction": F.mse_loss(full_precision(from_tokens), video[few]),
        "next_token": next_token,
        "context_recall": perceiver.recall_loss(context, means, delta),
    }


class TokenUpdates:
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

        Returns: `TOKENS`.
        """
        start = starts(is_init, *video.shape[:2], video.device)
        before = [buffer.clone() for buffer in self._learnt]
        with span("perceiver_io: tokens alone"), autocast:
            terms = score_tokens(self.model, video, actions, start)
        loss = self.losses.perceiver(terms)
        gradient = self._row.gather({"tokens": loss})[0]
        norm = torch.linalg.vector_norm(gradient)
        made = torch.isfinite(norm)
        self.optimizer.update(gradient * clip_factor(norm, self.clip), learning_rate * self.learning_rate_scale, made)
        for buffer, old in zip(self._learnt, before):
            buffer.copy_(torch.where(made, buffer, old))
        return dict(zip(TOKENS, (term.detach() for term in (*terms.values(), loss, norm))))
