"""Schedules as tiny objects: `Every` says when, `Warmup` and the learning rates say how much; `Schedules` are those of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from aime_fast.config import OptimConfig

Schedule = Callable[[int], float]

PERCEIVES_EVERY = 2  # picture steps: an update of the perceiver costs as much as those of encoder and decoder (docs/log.md)


@dataclass(frozen=True)
class Every:
    """True at steps n, 2n, 3n, ... and never where n is 0: `if should_log(step): ...`."""

    n: int

    def __call__(self, step: int) -> bool:
        return self.n > 0 and step > 0 and step % self.n == 0


class CheckpointDue:
    """True at steps n, 2n, ... of `every`, when `minutes` have passed, and at step `first` of a run without a checkpoint.

    It stays true until `saved`. A zero turns its rule off.
    """

    def __init__(self, every: int, minutes: float, first: int):
        self.every, self.first, self.minutes = Every(every), Every(first), minutes
        self._due, self._any, self._since = False, False, time.monotonic()

    def __call__(self, step: int) -> bool:
        late = self.minutes > 0 and time.monotonic() - self._since >= 60 * self.minutes
        self._due = self._due or late or self.every(step) or (not self._any and self.first(step))
        return self._due

    def saved(self) -> None:
        """A checkpoint was saved, or the run went on from one, just now."""
        self._due, self._any, self._since = False, True, time.monotonic()


@dataclass(frozen=True)
class Warmup:
    """Rises in a straight line from 0 at step 0 to `value` at step `steps`, and stays there."""

    value: float
    steps: float

    def __call__(self, step: int) -> float:
        return self.value if self.steps <= 0 else self.value * min(1.0, step / self.steps)


@dataclass(frozen=True)
class Start:
    """False before step `steps`, True from there on."""

    steps: float

    def __call__(self, step: int) -> bool:
        return step >= self.steps


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `value` at step 0 down to 0 at step `steps`. More steps on a resume stretch it."""

    value: float
    steps: int

    def __call__(self, step: int) -> float:
        return 0.5 * self.value * (1.0 + math.cos(math.pi * min(1.0, step / max(1, self.steps))))


def learning_rate(optim: OptimConfig, total_steps: int) -> Schedule:
    """The schedule of the generator's learning rate; the perceiver's is this times `optim.perceiver_lr_scale`."""
    after = Cosine(optim.learning_rate, total_steps) if optim.schedule == "cosine" else lambda step: optim.learning_rate
    rise = Warmup(1.0, optim.lr_warmup_steps)
    return lambda step: rise(step + 1) * after(step)


class Schedules:
    """What each update of a run is given, by the names of the arguments of `TrainingStep` and `TrainingStep.learn_pictures`.

    Args: optim: rates, warm-ups and intervals; updates_per_epoch: of joint updates; joint_steps: how many there will be.
    """

    def __init__(self, optim: OptimConfig, updates_per_epoch: float, joint_steps: int):
        self.updates_per_epoch = updates_per_epoch
        self._beta = Warmup(1.0, optim.beta_warmup_epochs * updates_per_epoch)
        self._own_tokens = Warmup(optim.own_tokens, optim.own_tokens_warmup_epochs * updates_per_epoch)
        self._overshoot = Warmup(1.0, optim.overshoot_warmup_epochs * updates_per_epoch)
        self._has_adversarial_task = Start(optim.adversarial_start_epochs * updates_per_epoch)
        self._trains_discriminator = Every(optim.n_critic)
        self._learning_rate = learning_rate(optim, joint_steps)
        self._picture_learning_rate = Warmup(optim.learning_rate, optim.lr_warmup_steps)
        self._perceives = Every(PERCEIVES_EVERY)

    def joint(self, step: int) -> dict[str, float | bool]:
        """Of a joint update with `step` joint ones before it."""
        return dict(
            beta=self._beta(step), learning_rate=self._learning_rate(step), train_discriminator=self._trains_discriminator(step + 1),
            adversarial=self._has_adversarial_task(step), own_tokens=self._own_tokens(step), overshoot=self._overshoot(step),
        )  # fmt: skip

    def picture(self, step: int) -> dict[str, float | bool]:
        """Of a picture step with `step` before it."""
        return dict(learning_rate=self._picture_learning_rate(step + 1), perceives=self._perceives(step + 1))
