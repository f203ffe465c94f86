"""NoisePolicy: the actions of recordings that no model made."""

from __future__ import annotations

import math

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase

from aime_fast.config import NoiseKind


class NoisePolicy(TensorDictModuleBase):
    """Actions that ignore the observations: float32 [A] in [-1, 1], a new episode wherever `is_init` is true.

    * "random" draws each action uniformly.
    * "ou" is an Ornstein-Uhlenbeck process, sampled exactly at the agent's steps: u' = r u + s sqrt(1 - r^2) n, r = exp(-rate),
      n normal. It pushes in one direction for about 1/rate steps and so reaches states that independent actions never reach. An
      episode starts from the stationary distribution.
    * "swing" draws a sinusoid for each episode and action, with a period log-uniform in `periods` (agent steps), an amplitude uniform
      in `amplitudes` and a uniform phase, and adds a little noise. Some periods are near the resonances of pole and limbs.
    * "mixed" plays each episode as "random" or "swing", with equal probability.
    """

    rate = 0.15
    deviation = 0.6
    periods = (20.0, 80.0)
    amplitudes = (0.4, 1.0)
    swing_noise = 0.1  # standard deviation

    def __init__(self, kind: NoiseKind, action_dim: int, seed: int = 0):
        super().__init__()
        self.in_keys, self.out_keys = ["is_init"], ["action"]
        self.kind, self.action_dim = kind, action_dim
        self.seed(seed)
        self._state = np.zeros(action_dim)
        self._swings = kind == "swing"
        self._frequency = self._phase = self._amplitude = np.zeros(action_dim)

    def seed(self, seed: int) -> None:
        """Begins its random numbers anew."""
        self._random = np.random.default_rng(seed)

    def forward(self, tensordict: TensorDict) -> TensorDict:
        first = tensordict["is_init"].item()
        if self.kind == "ou":
            noise = self.deviation * self._random.standard_normal(self.action_dim)
            decay = 0.0 if first else math.exp(-self.rate)
            action = self._state = decay * self._state + math.sqrt(1 - decay**2) * noise
        else:
            if first:
                self._begin()
            action = self._swing() if self._swings else self._random.uniform(-1, 1, self.action_dim)
        return tensordict.set("action", torch.from_numpy(np.clip(action, -1, 1).astype(np.float32)))

    def _begin(self) -> None:
        """Draw the kind and the sinusoids of an episode."""
        if self.kind == "mixed":
            self._swings = self._random.random() < 0.5
        if self._swings:
            shortest, longest = np.log(self.periods)
            self._frequency = 2 * np.pi / np.exp(self._random.uniform(shortest, longest, self.action_dim))
            self._phase = self._random.uniform(0, 2 * np.pi, self.action_dim)
            self._amplitude = self._random.uniform(*self.amplitudes, self.action_dim)

    def _swing(self) -> np.ndarray:
        action = self._amplitude * np.sin(self._phase) + self.swing_noise * self._random.standard_normal(self.action_dim)
        self._phase = self._phase + self._frequency
        return action
