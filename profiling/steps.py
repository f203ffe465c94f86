"""Training steps to measure, fed by the real loader as in the trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from aime_fast.config import Config
from aime_fast.data import make_batches
from aime_fast.runtime import ranks
from aime_fast.runtime.cuda_graph import WARM_UP
from aime_fast.runtime.machine import WAYS, choose_compile, choose_device, choose_kernels, choose_tf32, keep_freed_memory
from aime_fast.runtime.spans import span
from aime_fast.training.schedules import Every
from aime_fast.training.step import TrainingStep
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

UPDATE = "step: update"  # the range of a call to the step, loader excluded
EPISODES = 16  # synthetic ones: enough for a batch of every tier


def with_synthetic_frames(config: Config) -> Config:
    """The config with synthetic frames: the time of a step does not depend on what the frames show."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data="synthetic", episodes=EPISODES))


class Updates:
    """Updates one after another, on synthetic frames from the loader. They never wait for the device.

    Args:
        config: the run's settings, with `run.compile`, `run.kernels`, `run.precision` and `run.device`.

    Attributes:
        step, device, frames: the training step, its device, frames of an update.
        cycle: updates after which the pattern repeats: the discriminators learn in one of `n_critic`.
        warm_up: updates until the step is compiled and captured and its memory allocated.
        made: updates so far. waited: seconds spent so far in waiting for the loader.

    Raises:
        ConfigError: this machine lacks the device, the kernels or the compile mode.
    """

    def __init__(self, config: Config):
        self.config = config
        self.device = choose_device(ranks.local_device(config.run.device))
        compile = choose_compile(config.run.compile, self.device)
        choose_kernels(config.run.kernels)
        choose_tf32(config.run.tf32, config.run.precision)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.batches, validation = make_batches(with_synthetic_frames(config).data, config.run.seed, self.device, share=ranks.of_run())
        validation.close()
        torch.manual_seed(config.run.seed)
        model = DPGMMVariationalRecurrentAutoencoder.from_config(config, self.batches.action_dim).to(self.device)
        self.step = TrainingStep(model, config, compile)
        self.frames = config.data.batch_size * config.data.sequence_length * config.optim.accumulate
        self.cycle = config.optim.n_critic
        self.warm_up = self.cycle * (WARM_UP + 2 if WAYS[compile].captured else 2)
        self.made, self.waited = 0, 0.0
        self._one = torch.ones((), device=self.device)
        self._learning_rate = self._one * config.optim.learning_rate
        self._trains_discriminator = Every(self.cycle)

    def __call__(self) -> TensorDict:
        """Make one update; returns its metrics, still on the device."""
        began = time.perf_counter()
        with span("loader: next batch"):
            batches = [next(self.batches) for _ in range(self.config.optim.accumulate)]
        self.waited += time.perf_counter() - began
        self.made += 1
        with span(UPDATE):
            return self.step(batches, self._one, self._learning_rate, self._trains_discriminator(self.made))

    def close(self) -> None:
        """Stop the loader."""
        self.batches.close()


class FakeUpdates:
    """The same updates on fake tensors: every operator is called with its shapes and types, and nothing is computed.

    An operator that reads a value on the host, or has no shape function, raises. Precision is that of autocast on a CPU; batches are not
    accumulated.

    Args and attributes: as of `Updates`; device: where the fake tensors are said to be, see `fake_cuda` for CUDA.
    """

    def __init__(self, config: Config, device: str = "cpu"):
        self.frames, self.cycle = config.data.batch_size * config.data.sequence_length, config.optim.n_critic
        data = dataclasses.replace(with_synthetic_frames(config).data, prefetch=0)
        config = dataclasses.replace(config, data=data, optim=dataclasses.replace(config.optim, accumulate=1))
        batches, validation = make_batches(data, config.run.seed, torch.device("cpu"))
        batch, action_dim = next(batches).to_dict(), batches.action_dim
        batches.close()
        validation.close()
        model = DPGMMVariationalRecurrentAutoencoder.from_config(config, action_dim)
        self._mode = _CopyableFakes()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = parameter if parameter is None else nn.Parameter(self._fake(parameter.detach(), device))
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else self._fake(buffer, device)
        self._batch = {name: self._fake(value, device) for name, value in batch.items()}
        with self._mode, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # a deep copy asks whether there is any
            self.step, self._one = TrainingStep(model, config), torch.ones((), device=device)
        self.made = 0
        self._trains_discriminator = Every(self.cycle)

    def _fake(self, x: Tensor, device: str) -> Tensor:
        with self._mode:
            return self._mode.from_tensor(x).to(device)

    def __call__(self, recorder: contextlib.AbstractContextManager) -> None:
        """Make one update, its operators called under `recorder`."""
        self.made += 1
        with self._mode, recorder:
            self.step([self._batch], self._one, self._one, self._trains_discriminator(self.made))

    def learn_pictures(self) -> TensorDict:
        """Make one update on pictures; returns its metrics."""
        with self._mode:
            return self.step.learn_pictures([self._batch], self._one)


class _CopyableFakes(FakeTensorMode):
    """Fake tensors that may be copied deeply: the copy is of the same mode."""

    def __deepcopy__(self, memo: dict) -> _CopyableFakes:
        return self


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
