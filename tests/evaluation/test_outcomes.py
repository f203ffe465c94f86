from __future__ import annotations

import pytest
import torch
from models import make_batch, make_model
from tensordict import TensorDict

from aime_fast.evaluation.clips import cut_clips
from aime_fast.evaluation.outcomes import evaluate_outcomes, imagine_rewards


class Reading:
    """Heads that read the action out of h, which `Remembering` puts there."""

    def expected(self, hidden, latents):
        return hidden[..., 0], torch.ones_like(hidden[..., 0])


class Remembering(torch.nn.Module):
    """A recurrence whose h holds the last input: the action."""

    hidden_dim, num_layers = 24, 1

    def initial_state(self, batch, device, dtype):
        return torch.zeros(batch, 1, 2, 24, device=device, dtype=dtype)

    def forward(self, x, start, state=None):
        hidden = x[..., -2:-1].expand(-1, -1, 24)
        return hidden, hidden[:, :, None, None].expand(-1, -1, 1, 2, -1)


@pytest.fixture
def model():
    model = make_model()
    del model.outcomes
    model.outcomes, model.recurrence = Reading(), Remembering()
    return model


@torch.no_grad()
def test_a_reward_is_that_of_the_action_of_its_own_step(model):
    video, actions = make_batch(model, 3, 9)
    found = imagine_rewards(model, video[:, :4], actions[:, :4], actions[:, 4:])
    torch.testing.assert_close(found, actions[:, 4:, 0])


def test_errors_are_of_the_steps_after_the_context_beside_both_baselines(model):
    video, actions = make_batch(model, 2, 12)
    pixels = ((video + 1) * 127.5).round().to(torch.uint8)
    episodes = [TensorDict({"pixels": p, "action": a, "reward": a[:, :1]}, batch_size=[12]) for p, a in zip(pixels, actions)]
    found = evaluate_outcomes(model, cut_clips(episodes, context=4, horizon=6, per_episode=2), 0.25)
    assert found["clips"] == 4
    assert max(found["squared_error"]["model"]) < 1e-12
    assert found["ahead_to"] == 6
    assert found["return_correlation"]["6 steps"] == pytest.approx(1)
    starts = [(episode, first) for episode in range(2) for first in (0, 2)]
    at = torch.stack([actions[episode, first + 4 : first + 10, 0] for episode, first in starts])
    last = torch.stack([actions[episode, first + 3, 0] for episode, first in starts])
    assert found["squared_error"]["mean_reward"] == pytest.approx((at - 0.25).square().mean(0).tolist())
    assert found["squared_error"]["last_reward"] == pytest.approx((at - last[:, None]).square().mean(0).tolist())
    assert found["return_error"]["6 steps"]["mean_reward"] == pytest.approx((at - 0.25).sum(1).square().mean().item())


def test_without_a_clip_nothing_is_measured(model):
    video, actions = make_batch(model, 1, 10)
    episode = TensorDict({"pixels": video[0], "action": actions[0], "reward": actions[0, :, :1]}, batch_size=[10])
    assert evaluate_outcomes(model, cut_clips([episode], 4, 6, 1)[:0], 0.0) == {"clips": 0}
