"""Convert recordings of other programs: `python -m aime_fast.convert SOURCE --out FILE`, see docs/data.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from aime_fast.bounds import check
from aime_fast.cli import parse_arguments, run_command
from aime_fast.config import DataConfig
from aime_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from aime_fast.data.foreign import Episode

PROG = "python -m aime_fast.convert"
UNIT = (-1.0, 1.0)  # range of actions


@dataclass(frozen=True)
class Conversion:
    """What to convert, and into what."""

    source: Positional[str]  # a file, or a folder of them
    out: Path  # HDF5 file to write
    format: str = "auto"  # npz (Dreamer, V-D4RL), hdf5 (of others), videos (films or folders of pictures); auto: by the names of files
    map: tuple[str, ...] = ()  # what is called how: pixels=obs/agentview_image action=actions; action=none for films without actions
    action_leads: bool | None = None  # a row's action led to its picture, as in Dreamer; usual for npz alone
    action_range: tuple[float, float] | None = None  # of recorded actions, LOW HIGH, brought to [-1, 1]; none: they are in it
    image_size: int = DataConfig.image_size  # H = W, pixels; pictures are brought to it by area
    frame_skip: int = 1  # simulator steps for one row of the source, for the record
    domain: str = "converted"  # what the data are called; training asks for the same
    task: str | None = None  # the same; none: the name of the source
    max_episodes: int | None = None  # convert the first ones alone
    overwrite: bool = False  # replace an existing file
    progress: bool = True  # show how many episodes are done


def main(argv: Sequence[str] | None = None) -> Path:
    """Parse `argv` (None: `sys.argv`), convert and print a summary; returns the file. Raises ConfigError, DataError."""
    options = parse_arguments(Conversion, PROG, "Convert recordings of other programs into one HDF5 file.", argv)
    from aime_fast.data import DMCVBDataset
    from aime_fast.data.files import writable_target
    from aime_fast.data.foreign import detect, read
    from aime_fast.data.foreign.episode import Names

    check(DataConfig(image_size=options.image_size, frame_skip=options.frame_skip))
    if options.max_episodes is not None and options.max_episodes < 1:
        raise ConfigError(f"--max-episodes {options.max_episodes}: expected at least 1")
    if options.action_range is not None and not options.action_range[0] < options.action_range[1]:
        low, high = options.action_range
        raise ConfigError(f"--action-range {low:g} {high:g}: expected the lower number first")
    if writable_target(options.out).exists() and not options.overwrite:
        raise DataError(f"--out {options.out}: the file exists; pass --overwrite to replace it, or another --out")
    if wrong := [pair for pair in options.map if "=" not in pair]:
        raise ConfigError(f"--map {wrong[0]}: expected WHAT=NAME, such as pixels=obs/agentview_image")
    source = Path(options.source)
    form = detect(source) if options.format == "auto" else options.format
    names = Names(dict(pair.split("=", 1) for pair in options.map), options.action_leads)
    rewards = _write(options, source, form, itertools.islice(read(source, form, names), options.max_episodes))
    data = DMCVBDataset(options.out, 1)
    size = options.out.stat().st_size / 2**20
    print(
        f"{options.out}: {data.num_episodes} episodes of {min(data.lengths)} to {max(data.lengths)} frames, {sum(data.lengths)} in all, "
        f"{data.action_dim} actions, {size:.1f} MiB"
    )
    if not rewards:
        print("no rewards were recorded: zeros are stored, and what predicts rewards will learn nothing")
    task = data.attributes["task"]
    print(
        f"train on it with: python -m aime_fast.train --tier 1 --data {options.out} --domain {options.domain} --task {task} --frame-skip "
        f"{options.frame_skip} --image-size {options.image_size} --render-quality full"
    )
    return options.out


def _write(options: Conversion, source: Path, form: str, episodes: Iterator[Episode]) -> bool:
    """Write the episodes; returns whether they have rewards. Memory: one episode."""
    from aime_fast.data import EpisodeWriter

    first = next(episodes, None)
    if first is None:
        raise DataError(f"{source}: no episode is in it")
    low, high = options.action_range or UNIT
    attributes = {
        "domain": options.domain, "task": options.task or source.stem, "frame_skip": options.frame_skip,
        "image_size": options.image_size, "render_quality": "full", "action_dim": first.action.shape[1], "source": str(source),
        "source_format": form, "action_low": low, "action_high": high, "policy": "recorded elsewhere",
    }  # fmt: skip
    with EpisodeWriter(options.out, attributes) as writer:
        for episode in itertools.chain([first], episodes):
            if (actions := episode.action.shape[1]) != first.action.shape[1]:
                raise DataError(f"{episode.where}: {actions} actions, {first.where} has {first.action.shape[1]}; convert them apart")
            if (episode.reward is None) != (first.reward is None):
                raise DataError(f"{episode.where}: {'lacks' if episode.reward is None else 'has'} rewards, unlike {first.where}")
            writer.write(_arrays(episode, options))
            if options.progress:
                print(f"\r{writer.episodes} episodes", end="", flush=True)
    if options.progress:
        print()
    return first.reward is not None


def _arrays(episode: Episode, options: Conversion) -> dict[str, np.ndarray]:
    """The arrays of `aime_fast.data.episodes`."""
    import numpy as np

    low, high = options.action_range or UNIT
    action = (2 * (episode.action - low) / (high - low) - 1).astype(np.float32) if options.action_range else episode.action
    outside = ~(np.isfinite(action) & (np.abs(action) <= 1))
    if outside.any():
        row, which = np.argwhere(outside)[0]
        raise DataError(
            f"{episode.where}: action {which} of row {row} is {episode.action[row, which]:g}, outside [{low:g}, {high:g}]; give the range "
            "of the recorded actions with --action-range LOW HIGH"
        )
    frames = len(action)
    reward = np.zeros(frames, np.float32) if episode.reward is None else episode.reward
    discount = np.ones(frames, np.float32) if episode.discount is None else episode.discount
    return {
        "pixels": _resized(episode.pixels, options.image_size), "action": action, "reward": reward, "discount": discount,
        "is_init": np.arange(frames) == 0,
    }  # fmt: skip


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [T, h, w, 3] -> [T, size, size, 3]: the middle square, by the area of its pixels; smaller pictures are enlarged linearly."""
    import numpy as np
    from PIL import Image

    height, width = pixels.shape[1:3]
    if (height, width) == (size, size):
        return np.ascontiguousarray(pixels)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    box, how = (left, top, left + side, top + side), Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(frame).resize((size, size), how, box)) for frame in pixels])


if __name__ == "__main__":
    run_command(main)
