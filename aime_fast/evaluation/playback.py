"""A recorded episode as a film: its pictures, and below each its number, its action and its reward."""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aime_fast.evaluation.pictures import enlarge, write_video

SMALLEST = 288  # least side of an enlarged picture, pixels
FONT_SIZE, LINE, MARGIN = 14, 18, 6  # pixels
PAPER, INK = (24, 24, 28), (235, 235, 235)


def write_episode(path: Path, pixels: np.ndarray, action: np.ndarray, reward: np.ndarray, frames_per_second: int = 12) -> None:
    """Write an episode as mp4, one frame of the film a picture.

    Args:
        path: to write.
        pixels: uint8 [T, H, W, 3]. action: float32 [T, A], taken after the picture. reward: float32 [T], received for it.
    Raises:
        OSError: the file cannot be written.
    """
    write_video(path, episode_frames(pixels, action, reward), frames_per_second)


def episode_frames(pixels: np.ndarray, action: np.ndarray, reward: np.ndarray) -> Tensor:
    """The frames of that film, uint8 [T, H', W', 3]: pictures enlarged by a whole factor, and text below. Arguments as `write_episode`."""
    pictures = enlarge(torch.from_numpy(pixels), SMALLEST)  # [T, h, w, 3]
    width = pictures.shape[2]
    wrapped = [
        _lines(t, len(pixels), action[t], reward[t], float(reward[: t + 1].sum(dtype=np.float64)), width) for t in range(len(pixels))
    ]
    height = 2 * MARGIN + LINE * max(map(len, wrapped))
    return torch.cat([pictures, torch.from_numpy(np.stack([_strip(lines, width, height) for lines in wrapped]))], 1)


def _lines(t: int, frames: int, action: np.ndarray, reward: float, total: float, width: int) -> list[str]:
    """What is said of frame t, in lines that fit into the width."""
    columns = int((width - 2 * MARGIN) / _font().getlength("0"))
    actions = textwrap.wrap(" ".join(f"{value:+.2f}" for value in action), columns - len("action "))
    return [
        f"frame  {t} / {frames - 1}",
        *(f"{'action' if i == 0 else '':6} {part}" for i, part in enumerate(actions)),
        f"reward {reward:+.4g}",
        f"sum    {total:+.4g}",
    ]


def _strip(lines: list[str], width: int, height: int) -> np.ndarray:
    """Lines of text as a picture, uint8 [height, width, 3]."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * LINE), line, INK, _font())
    return np.asarray(image)


@cache
def _font():
    """The fixed-width font that comes with matplotlib, so that numbers stay in their places."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), FONT_SIZE)
