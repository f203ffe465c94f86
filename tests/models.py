"""The debug model in float64, deterministic, and random batches for it."""

from __future__ import annotations

import dataclasses

import torch

from aime_fast.config import Config, preset
from aime_fast.world_model import DPGMMVariationalRecurrentAutoencoder

ACTIONS = 2


def debug_config(**model_fields) -> Config:
    """The debug preset, with some fields of the model changed."""
    config = preset("debug")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model_fields))


def make_model(seed: int = 0, **model_fields) -> DPGMMVariationalRecurrentAutoencoder:
    """A debug model in float64 and eval mode, its codebook spread over the encoder's outputs and no weight at zero."""
    torch.manual_seed(seed)
    model = DPGMMVariationalRecurrentAutoencoder.from_config(debug_config(**model_fields), ACTIONS).double()
    video, actions = make_batch(model, 2, 5, seed)
    model.train()
    model.forward_sequence(video, actions)  # places the codes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)  # zero-initialised layers must not hide a dependence
    return model.eval()


def make_batch(model, batch: int, frames: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random video [B, T, 3, H, W] in [-1, 1] and actions [B, T, A], float64."""
    generator = torch.Generator().manual_seed(seed)
    size = model.image_size
    video = torch.rand(batch, frames, 3, size, size, generator=generator, dtype=torch.float64) * 2 - 1
    actions = torch.rand(batch, frames, model.action_dim, generator=generator, dtype=torch.float64) * 2 - 1
    return video, actions
