"""Updates of encoder and decoder alone, on single frames drawn from all episodes (`--stills`).

The frames of a sequence look alike, and an update of all tasks costs as much as a dozen of these: pictures are learnt faster from many
small batches of single frames (docs/log.md). Encoder and slots get an empty state and no context. The prior of a single frame is
N(0, I), from the first update on: it gives latents their scale, since to the mixture prior, which is relative to the latent before, any
scale is the same. They are made before each update of all tasks, and in the first steps of a run (`--picture-steps`) instead of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aime_fast.config import LossConfig
from aime_fast.imagination.sequence import sample_latents
from aime_fast.runtime import ranks, streams
from aime_fast.runtime.spans import span
from aime_fast.training.adam import Adam, clip_factor
from aime_fast.training.arena import Arena, GradientRows

# Scalars of these updates, in the order of computation.
STILLS = ("loss/recon_stills", "loss/kl_stills", "gradient_norm/stills")


@torch.no_grad()
def still_maps(model: nn.Module, frames: Tensor, attends: bool = True) -> Tensor:
    """Frames [N, 3, H, W] in [-1, 1] -> the maps [N, Ha, Wa] that their decoder gets, some uniform in training.

    Not `attends`: all are, as long as attention has learnt nothing.
    """
    count, like = len(frames), model.decoder.background
    if not attends:
        return model.attention.uniform(count).to(like.dtype)
    hidden = like.new_zeros(count, model.recurrence.hidden_dim)
    context = like.new_zeros(count, model.perceiver_io.context_dim)
    return model.with_dropout(model.attention.posterior(frames, hidden, context).attention, (count, 1))


def score_stills(model: nn.Module, frames: Tensor, maps: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Frames [N, 3, H, W] in [-1, 1] -> (reconstruction, KL to N(0, I)), scalars in nats a frame.

    Args: maps: gives the maps [N, Ha, Wa]; called when the frames are encoded, since it may wait for them.
    """
    q = model.encoder(frames, model.decoder.background.new_zeros(len(frames), model.perceiver_io.context_dim))
    decoded = model.decoder(sample_latents(q.mean, q.logvar, True), maps())
    kl = 0.5 * (q.mean.square() + q.logvar.exp() - 1 - q.logvar).sum(1)
    return model.decoder.likelihood.nll(decoded, frames).mean(), kl.mean()


class StillUpdates:
    """Adam on encoder and decoder.

    Args:
        model: whose `encoder` and `decoder` have the first parameters of `generator`.
        generator: arena of the model.
        batches: into which the frames of a batch are cut; each makes an update.
        losses: weights.
        clip: largest gradient norm.
        beta1: of Adam.
    """

    def __init__(self, model: nn.Module, generator: Arena, batches: int, losses: LossConfig, clip: float, beta1: float):
        self.model, self.batches, self.losses, self.clip = model, batches, losses, clip
        self.arena = generator.part(slice(sum(1 for tower in (model.encoder, model.decoder) for _ in tower.parameters())))
        self._row = GradientRows(self.arena, 1)
        self.optimizer = Adam(self.arena.flat, beta1)

    def __call__(self, frames: Tensor, learning_rate: Tensor, autocast: torch.autocast, attends: bool = True) -> dict[str, Tensor]:
        """Updates from frames [N, 3, H, W] in [-1, 1]; one whose gradient is not finite is not made.

        Args: learning_rate: scalar tensor; attends: see `still_maps`.

        Returns: `STILLS`, means over the updates.
        """
        with span("encoder_decoder: stills"), autocast:
            maps = streams.beside("attention", still_maps, self.model, frames, attends)  # no update of these changes attention
        scalars = []
        for i, part in enumerate(frames.tensor_split(self.batches)):
            with span("encoder_decoder: stills"), autocast:
                recon, kl = score_stills(self.model, part, lambda i=i: maps().tensor_split(self.batches)[i])
            loss = (self.losses.lambda_recon * recon + self.losses.beta * kl) / part[0].numel()
            gradient = ranks.average_(self._row.gather({"stills": loss})[0])
            norm = torch.linalg.vector_norm(gradient)
            self.optimizer.update(gradient * clip_factor(norm, self.clip), learning_rate, torch.isfinite(norm))
            scalars.append(torch.stack([recon.detach(), kl.detach(), norm]))
        return dict(zip(STILLS, torch.stack(scalars).mean(0).unbind()))
