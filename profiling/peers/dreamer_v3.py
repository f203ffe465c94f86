"""The world model of DreamerV3 as TorchRL ships it: the peer of `profiling.bench learning`.

Hafner et al., "Mastering Diverse Domains through World Models", arXiv 2301.04104. Networks (`DreamerV3ImageEncoder/Decoder`, `RSSMPriorV3`,
`RSSMPosteriorV3`, `RSSMRolloutV3`), losses (`DreamerV3ModelLoss`) and optimizer (`DreamerV3Optimizer`: LaProp with adaptive clipping) are
those of torchrl 0.14. Written out here is what it lacks: prediction without sampling (its prior and posterior always sample), samples
with a seed for each row, a moving average of the weights as our own model is evaluated with, and the translation of our batches.

Actions: in our data a_t is taken after frame t is seen. An RSSM wants with each frame the action that led to it, so actions are shifted by
one (`lead_to`). The action before the first frame of a sequence is not in it: the RSSM starts there from an empty state and a zero action,
in training as in prediction.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from aime_fast.data import normalise

UNIMIX = 0.01  # share of the uniform distribution in every categorical, as published
REWARD_BINS = 255
FAINT = 0.1  # factor of the decoder's last layer where the mean frame is given


@dataclass(frozen=True)
class DreamerV3Config:
    """Sizes and optimization. docs/learning.md says what was tried; what is not here is as published."""

    depth: int = 8  # channels of the first level are `depth * mults[0]`
    mults: tuple[int, ...] = (2, 3, 4, 4)  # channels at H/2, H/4, H/8, H/16, in units of depth
    kernel_size: int = 5  # of every convolution
    belief_dim: int = 1024  # deterministic state, of the block GRU
    blocks: int = 8  # of the block GRU and of the decoder's first layer
    hidden_dim: int = 256  # of prior, posterior and reward head
    categoricals: int = 32  # stochastic state: so many categoricals
    classes: int = 16  # of so many classes
    lambda_reco: float = 1.0  # weight of the reconstruction: sum of squares over pixels in [0, 1]
    free_nats: float = 1.0  # of both KL terms
    mean_frame: Literal["none", "encoder", "both"] = "encoder"  # what is given the mean training frame; published: none
    learning_rate: float = 1e-3  # published: 4e-5, for runs of millions of frames
    warmup_steps: int = 50  # published: 1000, as many as a whole short run
    final_rate: float = 1.0  # share of the learning rate that is left at the end of the budget; it falls as a cosine
    ema_decay: float = 0.99  # of the weights that are evaluated
    batch_size: int = 16
    sequence_length: int = 16


class Latent(NamedTuple):
    """What the RSSM hands from frame to frame."""

    state: Tensor  # [B, categoricals * classes]
    belief: Tensor  # [B, belief_dim]


class DreamerV3(nn.Module):
    """Trains and predicts as our own world model does, so that both are measured by the same code.

    Args:
        image_size: H = W, divisible by 2 to the number of levels.
        action_dim: A.
        seed: of the weights. Samples in training come from torch's default generator.
        config: sizes and optimization.

    Attributes:
        latents: which latents stand for a distribution where nothing is sampled: "mode", the likeliest class of each categorical, or
            "expected", the probabilities themselves. `choose_latents` sets it.
        averaged: the moving average of the weights, by which `reconstruct` and `predict_future` work.

    Raises ModuleNotFoundError without torchrl.

    Example:
        >>> peer = DreamerV3(64, 1, seed=0)
        >>> peer.update(batch)
        >>> film = peer.predict_future(frames, actions, future_actions)["reconstructions"]
    """

    def __init__(self, image_size: int, action_dim: int, seed: int = 0, config: DreamerV3Config | None = None):
        super().__init__()
        from torchrl.objectives import DreamerV3ModelLoss
        from torchrl.trainers.algorithms.dreamer_v3 import DreamerV3Optimizer

        self.config = config or DreamerV3Config()
        self.sizes = (image_size, action_dim)
        self.latents: Literal["mode", "expected"] = "mode"
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.world_model = WorldModel(image_size, action_dim, self.config)
        self.averaged = copy.deepcopy(self.world_model).requires_grad_(False)
        self.updates = 0
        self.loss = DreamerV3ModelLoss(
            self.world_model, lambda_reco=self.config.lambda_reco, kl_mode="separate", lambda_dynamic=1.0, lambda_representation=0.1,
            unimix=UNIMIX, free_bits=self.config.free_nats, reco_symlog=False, num_reward_bins=REWARD_BINS,
        )  # fmt: skip
        self.optimizer = DreamerV3Optimizer(
            self.world_model.parameters(), lr=self.config.learning_rate, warmup_steps=self.config.warmup_steps
        )

    def give_mean_frame(self, mean_frame: Tensor) -> None:
        """Gives the mean training frame [3, H, W] in [-1, 1] to what `config.mean_frame` says; our own model is given it too.

        The encoder then sees, and the decoder draws, the difference from it, the decoder at first a small one.
        """
        for model in (self.world_model, self.averaged):
            if self.config.mean_frame != "none":
                model.seen.copy_((mean_frame + 1) / 2)
            if self.config.mean_frame == "both":
                model.drawn.copy_((mean_frame + 1) / 2)
                model.decoder.layers[-1].weight.data.mul_(FAINT)

    def update(self, batch: TensorDict, spent: float = 0.0) -> dict[str, Tensor]:
        """One update of the weights and of their average.

        Args:
            batch: [B, T] with pixels uint8 [B, T, 3, H, W], action [B, T, A], is_init bool [B, T, 1] and, if it is to be predicted,
                reward [B, T, 1], received for the action of the same row.
            spent: share of the training that is over, for the learning rate.

        Returns:
            the losses by name, detached: reco, reward, dynamic, representation.
        """
        falling = self.config.final_rate + (1 - self.config.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * falling
        losses, _ = self.loss(self.sequences(batch))
        self.optimizer.zero_grad(set_to_none=False)
        sum(losses.values()).backward()
        self.optimizer.step()
        self.updates += 1
        decay = min(self.config.ema_decay, self.updates / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.world_model.parameters()), 1 - decay)
        return {name.removeprefix("loss_model_"): value.detach() for name, value in losses.items()}

    def sequences(self, batch: TensorDict) -> TensorDict:
        """A batch of ours in TorchRL's layout: row t holds the action that led to frame t, and under `next` the frame and its reward."""
        shape, pixels = batch.shape, batch["pixels"]
        start = batch["is_init"].reshape(*shape, 1).clone()
        start[:, 0] = True
        # The reward before the first frame is not in the batch; the one after it stands in.
        reward = batch.get("reward", torch.zeros(*shape, 1, device=pixels.device))
        latent = self.world_model.start(shape[0])
        return TensorDict(
            {
                "action": lead_to(batch["action"]),
                "is_init": start,
                "state": latent.state[:, None].expand(*shape, -1),
                "belief": latent.belief[:, None].expand(*shape, -1),
                "next": {"pixels": pixels, "reward": torch.cat([reward[:, :1], reward[:, :-1]], 1)},
            },
            batch_size=shape,
        )

    @torch.no_grad()
    def reconstruct(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[B, T, 3, H, W] and [B, T, A], taken after each frame -> reconstructions [B, T, 3, H, W] in [-1, 1]."""
        latents, _ = self._observe(observations, lead_to(actions), None)
        return self._decode(latents)

    @torch.no_grad()
    def predict_future(
        self, observations: Tensor, actions: Tensor, future_actions: Tensor, sample: bool = False, seeds: Sequence[int] | None = None
    ) -> TensorDict:
        """Open-loop prediction; arguments as in `DPGMMVariationalRecurrentAutoencoder.predict_future`.

        Args:
            observations: uint8, or float in [-1, 1], [B, Tc, 3, H, W].
            actions: [B, Tc, A], taken after each of them.
            future_actions: [B, F, A]; future_actions[:, i] is taken after predicted frame i: frame i depends on those before i.
            sample: sample posterior and prior; otherwise take what `latents` says.
            seeds: of a sample, one a row: a row's sample does not depend on the others. None draws from the default generator.

        Returns:
            TensorDict [B, F]: reconstructions [B, F, 3, H, W] in [-1, 1].
        """
        batch, observed = observations.shape[:2]
        led = lead_to(torch.cat([actions, future_actions], 1))
        noise = self._noise(led.shape[:2], seeds, led.device) if sample else None
        _, latent = self._observe(observations, led[:, :observed], noise)
        latents = []
        for t in range(observed, led.shape[1]):
            logits, _, belief = self.averaged.prior(latent.state, latent.belief, led[:, t])
            latent = Latent(self._state(logits, None if noise is None else noise[:, t]), belief)
            latents.append(latent)
        return TensorDict({"reconstructions": self._decode(latents)}, batch_size=(batch, len(latents)))

    def choose_latents(self, observations: Tensor, actions: Tensor, future: Tensor) -> dict[str, float]:
        """Sets `latents` to what predicts validation clips better, by squared error.

        Args: observations as in `predict_future`; actions [B, Tc + F, A]; future [B, F, 3, H, W], the frames to predict.
        Returns: the mean squared error of each.
        """
        errors, truth, observed = {}, _frames(future), observations.shape[1]
        for self.latents in ("mode", "expected"):
            film = self.predict_future(observations, actions[:, :observed], actions[:, observed:])["reconstructions"]
            errors[self.latents] = (film.clamp(-1, 1) - truth).square().mean().item()
        self.latents = min(errors, key=errors.get)
        return errors

    def state(self) -> dict[str, Any]:
        """What prediction needs: sizes, updates made and the averaged weights."""
        return {"sizes": self.sizes, "updates": self.updates, "averaged": self.averaged.state_dict()}

    @classmethod
    def from_state(cls, state: dict[str, Any], config: DreamerV3Config) -> DreamerV3:
        """The inverse of `state`, to predict with; the weights in training are the averaged ones."""
        peer = cls(*state["sizes"], config=config)
        peer.updates = state["updates"]
        for model in (peer.averaged, peer.world_model):
            model.load_state_dict(state["averaged"])
        return peer.eval()

    def _observe(self, observations: Tensor, led: Tensor, noise: Tensor | None) -> tuple[list[Latent], Latent]:
        """The latent of each frame, and the last; `led` [B, T, A] led to the frames; noise as from `_noise`, None takes `self.latents`."""
        model = self.averaged
        embedded = model.embed((_frames(observations) + 1) / 2)
        latent, latents = model.start(len(observations)), []
        for t in range(observations.shape[1]):
            _, _, belief = model.prior(latent.state, latent.belief, led[:, t])
            logits, _ = model.posterior(belief, embedded[:, t])
            latent = Latent(self._state(logits, None if noise is None else noise[:, t]), belief)
            latents.append(latent)
        return latents, latent

    def _state(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Logits [B, categoricals, classes] -> state [B, categoricals * classes]: a sample by `uniform` [B, categoricals], or what
        `latents` says."""
        probabilities = (1 - UNIMIX) * logits.softmax(-1) + UNIMIX / logits.shape[-1]
        if uniform is None and self.latents == "expected":
            return probabilities.flatten(1)
        if uniform is None:
            chosen = probabilities.argmax(-1)
        else:
            chosen = (uniform[..., None] > probabilities.cumsum(-1)).sum(-1).clamp_max(logits.shape[-1] - 1)
        return torch.zeros_like(probabilities).scatter_(-1, chosen[..., None], 1.0).flatten(1)

    def _noise(self, shape: tuple[int, int], seeds: Sequence[int] | None, device: torch.device) -> Tensor:
        """Uniform numbers [B, T, categoricals] in [0, 1), of a seed for each row."""
        size = (shape[1], self.config.categoricals)
        if seeds is None:
            return torch.rand(shape[0], *size, device=device)
        return torch.stack([torch.rand(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)

    def _decode(self, latents: Sequence[Latent]) -> Tensor:
        state, belief = (torch.stack(parts, 1) for parts in zip(*latents))
        return 2 * self.averaged.decode(state, belief) - 1


class WorldModel(nn.Module):
    """The networks, and their pass over a batch as `DreamerV3ModelLoss` calls it."""

    def __init__(self, image_size: int, action_dim: int, config: DreamerV3Config):
        super().__init__()
        from tensordict.nn import TensorDictModule
        from torchrl.modules import (
            DreamerV3ImageDecoder,
            DreamerV3ImageEncoder,
            DreamerV3MLP,
            RSSMPosteriorV3,
            RSSMPriorV3,
            RSSMRolloutV3,
        )  # fmt: skip

        state_dim = config.categoricals * config.classes
        convolutions = dict(depth=config.depth, mults=config.mults, kernel_size=config.kernel_size)
        latents = dict(
            hidden_dim=config.hidden_dim, num_categoricals=config.categoricals, num_classes=config.classes,
            rnn_hidden_dim=config.belief_dim, unimix=UNIMIX,
        )  # fmt: skip
        self.encoder = DreamerV3ImageEncoder(3, **convolutions)
        self.prior = RSSMPriorV3(
            action_shape=(action_dim,), action_dim=action_dim, recurrent_model="block_gru", num_blocks=config.blocks, **latents
        )
        self.posterior = RSSMPosteriorV3(
            obs_embed_dim=self.encoder.output_features((3, image_size, image_size)), use_rms_norm=True, **latents
        )
        self.decoder = DreamerV3ImageDecoder(
            state_dim + config.belief_dim, (3, image_size, image_size), num_blocks=config.blocks, **convolutions
        )
        self.reward = DreamerV3MLP(state_dim + config.belief_dim, REWARD_BINS, depth=1, num_cells=config.hidden_dim, outscale=0.0)
        self.rollout = RSSMRolloutV3(
            TensorDictModule(
                self.prior,
                in_keys=["state", "belief", "action"],
                out_keys=[("next", "prior_logits"), ("next", "state"), ("next", "belief")],
            ),
            TensorDictModule(
                self.posterior,
                in_keys=[("next", "belief"), ("next", "encoded_latents")],
                out_keys=[("next", "posterior_logits"), ("next", "state")],
            ),
        )
        self.sizes = (state_dim, config.belief_dim)
        for name in ("seen", "drawn"):  # pictures from which the encoder sees, and the decoder draws, the difference; 0.5 is TorchRL's
            self.register_buffer(name, torch.full((3, image_size, image_size), 0.5))
        self.to(memory_format=torch.channels_last)  # 8 % faster on a CPU: the RMS norms are over channels

    def start(self, batch: int) -> Latent:
        """The latent before a first frame."""
        like = self.decoder.projection_norm.weight
        return Latent(*(torch.zeros(batch, size, device=like.device, dtype=like.dtype) for size in self.sizes))

    def embed(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 3, H, W] in [0, 1] -> [B, T, E]."""
        difference = frames - (self.seen - 0.5)  # the encoder subtracts 0.5
        return self.encoder(difference.flatten(0, 1).contiguous(memory_format=torch.channels_last)).unflatten(0, frames.shape[:2])

    def decode(self, state: Tensor, belief: Tensor) -> Tensor:
        """Latents [B, T, .] -> frames [B, T, 3, H, W], unbounded, near [0, 1]."""
        return self.decoder(state, belief) + (self.drawn - 0.5)  # it adds 0.5

    def forward(self, sequences: TensorDict) -> TensorDict:
        """Sequences [B, T] as of `DreamerV3.sequences`; adds under `next` logits, latents, reco_pixels [B, T, 3, H, W], reward_logits."""
        embedded = self.embed(sequences["next", "pixels"].float() / 255)
        out = self.rollout(sequences.set(("next", "encoded_latents"), embedded))
        latents = out["next", "state"], out["next", "belief"]
        out["next", "reco_pixels"] = self.decode(*latents)
        out["next", "reward_logits"] = self.reward(*latents)
        return out


def lead_to(actions: Tensor) -> Tensor:
    """Actions [B, T, A] taken after each frame -> those that led to each frame; none led to the first, for which it is zero."""
    return torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)


def _frames(observations: Tensor) -> Tensor:
    """uint8, or float in [-1, 1] -> float in [-1, 1]."""
    return observations if observations.is_floating_point() else normalise(observations)
