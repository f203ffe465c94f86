"""Overshooting: the model's own roll-out of a few frames, from a state that it inferred, scored against what was seen.

One-step training never shows the priors a state that they produced themselves, and open-loop prediction shows them nothing else. Here
latent, attention and context of k frames come from their predictions, as in `imagination.imagine`, and are scored: the latent's
posterior sample under the mixture, the attention map against the posterior's, the context against the one that was read, and the
frames that the decoder draws of them against the truth. Targets get no gradient, nor does the latent where the roll-out begins, so that
the posterior is not bent towards what is easy to predict. Source: latent overshooting (Hafner et al., arXiv 1811.04551), with pixels
scored too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aime_fast.attention_schema.schema import attention_kl
from aime_fast.imagination import dream, state_after
from aime_fast.inference import Inference
from aime_fast.multi_task_learning.loss_aggregator import OVERSHOOT
from aime_fast.multi_task_learning.losses import mixture_log_prob

SEEN = 3  # frames up to the first state, where the sequence is long enough: the fewest that show speed and its change


def overshoot(model: nn.Module, seen: Inference, video: Tensor, actions: Tensor, start: Tensor, frames: int) -> dict[str, Tensor]:
    """Rolls out min(frames, T - 1) frames from one random frame, the same for the whole batch, with SEEN - 1 before it where T allows.

    Args: seen, of B*T frames; video [B, T, 3, H, W] in [-1, 1]; actions [B, T, A]; start bool [B, T].

    Returns: the terms `OVERSHOOT`, in nats a frame, means over imagined frames that lie in the episode of the first; 0 where T is 1.
    """
    batch, length = start.shape
    frames = min(frames, length - 1)
    if frames < 1:
        return {name: video.new_zeros(()) for name in OVERSHOOT}
    earliest = min(SEEN - 1, length - frames - 1)
    first = torch.randint(earliest, length - frames, (1,), device=start.device)  # on the device: a captured graph draws anew

    def at(x: Tensor, age: int) -> Tensor:  # [B, T, ...] -> [B, ...]
        return x.index_select(1, first + age)[:, 0]

    latents, attention = seen.latents.unflatten(0, start.shape), seen.maps.attention.unflatten(0, start.shape)
    state = state_after(seen, lambda x: at(x, 0))
    going_on = torch.ones(batch, dtype=torch.bool, device=start.device)
    imagined, scores, weights = [], [], []
    for age in range(1, frames + 1):
        prior, log_attention, state = dream(model, at(actions, age), state)
        going_on = going_on & ~at(start, age)
        scores.append(
            torch.stack(
                [
                    -mixture_log_prob(at(latents, age).detach(), prior.log_weights, prior.means, prior.logvars),
                    attention_kl(at(attention, age).detach(), log_attention),
                    0.5 * (state.context - at(seen.context, age).detach()).square().sum(-1),
                ]
            )
        )
        imagined.append((state.latents, state.attention, at(video, age)))
        weights.append(going_on.to(scores[0].dtype))
    z, a, truth = (torch.cat(parts) for parts in zip(*imagined))  # [k * B, ...]
    recon = model.decoder.likelihood.nll(model.decoder(z, a), truth)
    weight = torch.cat(weights)
    everything = torch.cat([recon.unsqueeze(0), torch.cat(scores, dim=1)])  # [4, k * B]
    return dict(zip(OVERSHOOT, ((everything * weight).sum(1) / weight.sum().clamp_min(1.0)).unbind()))
