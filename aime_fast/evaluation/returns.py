"""What a policy earns: whole episodes played in the simulator, and the reward that the model expected."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

from aime_fast.config import DataConfig
from aime_fast.control.policy import FramePolicy
from aime_fast.data.collectors import play_episodes
from aime_fast.data.dataset import to_tensordict
from aime_fast.evaluation.pictures import write_prediction
from aime_fast.runtime.files import replacing

SEED_OFFSET = 1_000_000_007  # the seeds of these episodes are not those of training


def play(policy: FramePolicy, config: DataConfig, episodes: int, seed: int) -> list[TensorDict]:
    """Whole episodes as TensorDicts [T] of the layout of `DMCVBDataset`."""
    played = play_episodes(config, lambda: policy, SEED_OFFSET + seed)
    try:
        return [to_tensordict(episode) for episode in islice(played, episodes)]
    finally:
        played.close()


@torch.no_grad()
def expected_rewards(policy: FramePolicy, episode: TensorDict) -> torch.Tensor:
    """The reward [T] that the heads expect of each action of an episode [T], from the frames up to it."""
    model = policy.model
    inferred = model.infer(episode["pixels"][None], episode["action"][None])
    return model.outcomes.expected(inferred.hidden, inferred.posterior.mean.unflatten(0, inferred.hidden.shape[:2]))[0][0]


def summarise_returns(episodes: list[TensorDict], frame_skip: int) -> dict:
    """returns of each episode, mean, standard_error (None of a single one), minimum, frame_skip, episodes."""
    returns = [float(episode["reward"].sum()) for episode in episodes]
    error = float(np.std(returns, ddof=1) / math.sqrt(len(returns))) if len(returns) > 1 else None
    return {
        "returns": returns, "mean": float(np.mean(returns)), "standard_error": error, "minimum": min(returns),
        "frame_skip": frame_skip, "episodes": len(returns),
    }  # fmt: skip


def write_returns(policy: FramePolicy, episodes: list[TensorDict], out: Path, context: int, horizon: int) -> None:
    """Writes returns.mp4, the middle of the first episode beside the model's prediction, and returns.png, its rewards."""
    from matplotlib.figure import Figure

    first = episodes[0]
    write_prediction(policy.model, [first], out / "returns.mp4", policy.model.decoder.background.device, context, horizon)
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(first["reward"].flatten().numpy(), label="received")
    axes.plot(expected_rewards(policy, first.to(policy.model.decoder.background.device)).cpu().numpy(), label="expected", linestyle="--")
    axes.set_xlabel("agent step")
    axes.set_ylabel("reward")
    axes.legend()
    with replacing(out / "returns.png") as file:
        figure.savefig(file, format="png", dpi=100)
