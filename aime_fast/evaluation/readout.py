"""Whether the latent knows where things are: positions read out of posterior means, linearly and by nearest neighbours.

Linear probes as in Alain and Bengio (arXiv 1610.01644): a ridge regression in closed form, fitted on training episodes, scored on held-out
ones by R^2, the share of the variance that it explains: 1 is exact, 0 what the mean gives. A quantity that neighbours read but a line
does not is in the latent, but folded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor, nn

MAX_FRAMES = 4000  # most training frames to fit on
NEIGHBOURS = 10
RIDGE = 1e-3  # share of the latents' mean variance that is added to each


def quantities(positions: Tensor, names: Sequence[str], image_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """What is read out of each frame: positions [N, n, 2] -> (values [N] by name, bool [N]: the points that matter are in the picture).

    With a cart and the tip of a pole: the cart's column, and sine and cosine of the direction from cart to tip, zero where the pole
    stands upright. Otherwise column and row of every point.
    """
    tip = next((i for i, name in enumerate(names) if name.endswith("/tip")), None)
    if "cart" in names and tip is not None:
        cart = names.index("cart")
        positions = positions[:, [cart, tip]]
        right, down = (positions[:, 1] - positions[:, 0]).unbind(-1)
        length = torch.hypot(right, down).clamp_min(1e-6)
        values = {"cart_column": positions[:, 0, 0], "pole_sine": right / length, "pole_cosine": -down / length}
    else:
        values = {f"{name}_{axis}": positions[:, i, k] for i, name in enumerate(names) for k, axis in enumerate(("column", "row"))}
    return values, ((positions > -0.5) & (positions < image_size - 0.5)).all(-1).all(-1)


def r_squared(predicted: Tensor, truth: Tensor) -> list[float | None]:
    """1 - residual / total variance of each column of [N, k]; None for a column that does not vary."""
    total = (truth - truth.mean(0)).square().sum(0)
    residual = (truth - predicted).square().sum(0)
    return [1 - (r / t).item() if t > 1e-9 else None for r, t in zip(residual, total)]


def read_linearly(latents: Tensor, values: Tensor, new: Tensor) -> Tensor:
    """Ridge regression: fitted on latents [N, Z] and values [N, k], read at new [M, Z] -> [M, k], float64."""
    latents, values, new = (x.double() for x in (latents, values, new))
    centre, mean = latents.mean(0), values.mean(0)
    x = latents - centre
    covariance = x.T @ x / len(x)  # [Z, Z]
    ridge = RIDGE * covariance.diagonal().mean() + 1e-12
    weights = torch.linalg.solve(
        covariance + ridge * torch.eye(len(centre), dtype=x.dtype, device=x.device), x.T @ (values - mean) / len(x)
    )
    return mean + (new - centre) @ weights


def read_neighbours(latents: Tensor, values: Tensor, new: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Mean value of the nearest known latents: [N, Z], [N, k], new [M, Z] -> [M, k], float64."""
    nearest = torch.cdist(new.double(), latents.double()).topk(min(neighbours, len(latents)), largest=False).indices  # [M, neighbours]
    return values.double()[nearest].mean(1)


@torch.no_grad()
def infer_means(model: nn.Module, episodes: Sequence[TensorDict], device: torch.device) -> Tensor:
    """Posterior means [N, Z] of all frames of the episodes, each episode as one sequence, on the host."""
    return torch.cat([model.encode(episode["pixels"].unsqueeze(0).to(device))["posterior_mean"][0].cpu() for episode in episodes])


def probe_latents(
    model: nn.Module, training: Sequence[TensorDict], held_out: Sequence[TensorDict], names: Sequence[str], device: torch.device
) -> dict[str, dict[str, float | None]] | str:
    """R^2 on held-out episodes by quantity, `linear` and `neighbours`, of frames in which the points are in the picture.

    Args: model in eval mode; episodes with `pixels` and `positions`, on the host; names of the points.

    Returns: the table, or "not measured: ..." and why.
    """
    known, new = ((infer_means(model, part, device), torch.cat([e["positions"] for e in part])) for part in (training, held_out))
    sets = []
    for means, positions in (known, new):
        values, inside = quantities(positions, list(names), held_out[0]["pixels"].shape[-1])
        sets.append((means[inside], torch.stack(list(values.values()), 1)[inside]))
    (latents, fitted), (read, truth) = sets
    if min(len(latents), len(read)) < 2:
        return "not measured: the points are in the picture in fewer than two frames"
    linear, near = (r_squared(reader(latents, fitted, read), truth.double()) for reader in (read_linearly, read_neighbours))
    return {name: {"linear": a, "neighbours": b} for name, a, b in zip(values, linear, near)}
