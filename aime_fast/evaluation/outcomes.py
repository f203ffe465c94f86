"""How well rewards are predicted open-loop, beside baselines without a model.

Convention: the model observes `context` frames with their actions; step 1 is the reward of the first action after them, whose frame the
model does not see. Nothing is decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aime_fast.evaluation.clips import Clips
from aime_fast.imagination.frame import imagine_latents, state_after
from aime_fast.imagination.sequence import Latents, predict_latents
from aime_fast.layers import starts

RETURN_STEPS = 15  # over which an imagined return is compared with the true one
MODEL, MEAN, LAST = "model", "mean_reward", "last_reward"


@torch.no_grad()
def imagine_rewards(model: nn.Module, observations: Tensor, actions: Tensor, future_actions: Tensor) -> Tensor:
    """Expected rewards [B, F] of `future_actions` [B, F, A], after frames uint8 [B, Tc, 3, H, W] and their actions [B, Tc, A]."""
    state, after = state_after(model.infer(observations, actions), lambda x: x[:, -1]), []
    for action in future_actions.unbind(1):
        _, state = imagine_latents(model, action, state)
        after.append((state.hidden, state.latents))
    hidden, latents = (torch.stack(part, 1) for part in zip(*after))
    return model.outcomes.expected(hidden, latents)[0]


@torch.no_grad()
def explained_reward(model: nn.Module, pieces: Latents) -> float:
    """Share of the variance of rewards that the heads explain, of inferred pieces [B, T] of episodes: 1 exact, 0 as the mean."""
    start = starts(None, *pieces.mean.shape[:2], pieces.mean.device)
    hidden = predict_latents(model, pieces.mean, pieces.context, pieces.actions, start, sample=False).hidden
    expected, _ = model.outcomes.expected(hidden, pieces.mean)
    error, variance = (expected - pieces.reward).square().mean(), pieces.reward.var(unbiased=False)
    return (1 - error / variance.clamp_min(1e-12)).item()


def evaluate_outcomes(model: nn.Module, clips: Clips, mean_reward: float, batch: int = 16) -> dict:
    """Errors of predicted rewards, step by step.

    Args:
        model: in eval mode.
        clips: with rewards.
        mean_reward: of the training episodes.
        batch: clips at once.

    Returns:
        clips; reward_variance; squared_error by source (model, mean_reward, last_reward): a mean over clips for each step; ahead_to: the
        last step up to which the model's error is below both baselines'; return_error (squared, by source) and return_correlation over the
        first `RETURN_STEPS` steps and over the horizon, the latter None where a return does not vary.
    """
    if not len(clips):
        return {"clips": 0}
    context, horizon, predicted = clips.context, clips.horizon, []
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch].to(model.decoder.background.device)
        rewards = imagine_rewards(model, part.pixels[:, :context], part.actions[:, :context], part.actions[:, context:])
        predicted.append(rewards.double().cpu())
    rewards = clips.rewards.double().cpu()
    truth, model_rewards = rewards[:, context:], torch.cat(predicted)
    guesses = {
        MODEL: model_rewards, MEAN: torch.full_like(truth, mean_reward), LAST: rewards[:, context - 1 : context].expand_as(truth)
    }  # fmt: skip
    errors = {name: (guess - truth).square().mean(0) for name, guess in guesses.items()}
    spans = dict.fromkeys((min(RETURN_STEPS, horizon), horizon))
    worse = (errors[MODEL] >= torch.minimum(errors[MEAN], errors[LAST])).nonzero()
    return {
        "clips": len(clips),
        "reward_variance": truth.var(unbiased=False).item(),
        "squared_error": {name: error.tolist() for name, error in errors.items()},
        "ahead_to": int(worse[0]) if len(worse) else horizon,
        "return_error": {
            f"{steps} steps": {name: (guess - truth)[:, :steps].sum(1).square().mean().item() for name, guess in guesses.items()}
            for steps in spans
        },
        "return_correlation": {f"{steps} steps": _correlation(model_rewards[:, :steps].sum(1), truth[:, :steps].sum(1)) for steps in spans},
    }


def _correlation(a: Tensor, b: Tensor) -> float | None:
    """Of two series [N]; None where one does not vary."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()
