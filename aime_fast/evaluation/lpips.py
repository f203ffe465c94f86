"""LPIPS (Zhang et al., arXiv 1801.03924), where the package `lpips` and its weights are at hand. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

Lpips = Callable[[Tensor, Tensor], Tensor]
SMALLEST = 64  # pixels: AlexNet's layers reduce a smaller picture to nothing


def find_lpips(device: torch.device | str) -> Lpips | str:
    """The measure with the AlexNet backbone, or the reason why it is missing: "not measured: ..."

    The measure maps predicted and true frames, [N, F, 3, H, W] in [-1, 1], to distances [N, F].
    """
    if find_spec("lpips") is None:
        return "not measured: the package lpips is not installed (pip install lpips)"
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(weights.glob("alexnet-*.pth")):
        return f"not measured: AlexNet's weights are not in {weights} (python -c \"import lpips; lpips.LPIPS(net='alex')\" fetches them)"
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision made for another torch
        return f"not measured: the package lpips is here but cannot be imported ({error})"
    net = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    def measure(predicted: Tensor, truth: Tensor) -> Tensor:
        frames = [x.float().clamp(-1, 1).flatten(0, 1) for x in torch.broadcast_tensors(predicted, truth)]
        if frames[0].shape[-1] < SMALLEST:
            frames = [torch.nn.functional.interpolate(x, size=SMALLEST, mode="bilinear", antialias=True) for x in frames]
        return net(*frames).view(truth.shape[:2])

    return measure
