"""Policies as TensorDict modules that TorchRL's collectors run, one frame a call: their memory, and the actor's."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from aime_fast.control.actor_critic import Actor, policy_features
from aime_fast.imagination.frame import State, advance, observe
from aime_fast.layers import to_frames


class FramePolicy(TensorDictModuleBase):
    """Observes a frame, chooses an action, and keeps the `State` for the next frame; the state is emptied wherever `is_init` is true.

    Reads `pixels` uint8 [*N, H, W, 3] and `is_init` bool [*N, 1]; writes `action` float32 [*N, A]. N environments, or none: a single one.
    Their number may change only where all begin an episode. A subclass says how to `choose`.

    Args: model: world model in eval mode.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.in_keys, self.out_keys = ["pixels", "is_init"], ["action"]
        self.model = model
        self.state: State | None = None

    def choose(self, seen: State) -> Tensor:
        """The action [N, A] of a frame, from its state as `observe` gives it."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        pixels, init = tensordict["pixels"], tensordict["is_init"]
        action = self.act(pixels.reshape(-1, *pixels.shape[-3:]), init.reshape(-1))
        return tensordict.set("action", action.reshape(*pixels.shape[:-3], -1).to(pixels.device))

    def act(self, pixels: Tensor, init: Tensor) -> Tensor:
        """Frames uint8 [N, H, W, 3], where an episode begins bool [N] -> actions float32 [N, A]."""
        background = self.model.decoder.background
        frames = to_frames(pixels.to(background.device).permute(0, 3, 1, 2).unsqueeze(1), background.dtype)[:, 0]
        if self.state is None or len(self.state.hidden) != len(frames):
            self.state = self.model.initial_state(len(frames))
        seen = observe(self.model, frames, self.state, init.to(background.device))
        action = self.choose(seen)
        self.state = advance(self.model, seen, action)
        return action.float()


class WorldModelPolicy(FramePolicy):
    """Chooses by the actor.

    Args:
        model: world model in eval mode.
        actor: on the same device.
        sample: actions with the actor's noise; else its mean.
    """

    def __init__(self, model: nn.Module, actor: Actor, sample: bool = True):
        super().__init__(model)
        self.actor, self.sample = actor, sample

    def choose(self, seen: State) -> Tensor:
        return self.actor(policy_features(seen), self.sample)[0]
