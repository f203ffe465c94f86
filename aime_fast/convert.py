"""Convert recordings of other programs: `python -m aime_fast.convert SOURCE --out FILE`, see docs/data.md."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from aime_fast.bounds import check
from aime_fast.cli import parse_arguments, run_command
from aime_fast.config import DataConfig
from aime_fast.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from aime_fast.data import DMCVBDataset
    from aime_fast.data.conversion import Converted, Recipe
    from aime_fast.data.foreign import Episode

PROG = "python -m aime_fast.convert"
UNIT = (-1.0, 1.0)  # range of actions
SHEET = (6, 8)  # episodes and frames of each on the contact sheet, at most


@dataclass(frozen=True)
class Conversion:
    """What to convert, and into what."""

    source: Positional[str]  # a file, or a folder of them
    out: Path  # HDF5 file to write; a name without a suffix: a folder of files of 100 episodes, which is read as one
    format: str = "auto"  # see docs/data.md; auto: by the names of files
    map: tuple[str, ...] = ()  # what is called how: pixels=obs/agentview_image action=actions
    camera: str | None = None  # which of several: the same as --map pixels=NAME, and kept in the file; training asks for the same
    actions: Literal["recorded", "none"] = "recorded"  # none: whatever was recorded, one action is stored, always 0
    action_leads: bool | None = None  # a row's action led to its picture, as in Dreamer; usual for npz, and beside a column step_type
    action_range: tuple[float, float] | None = None  # of recorded actions, LOW HIGH, brought to [-1, 1]; none: they are in it
    find_action_range: bool = False  # bring each action's own least and largest value to -1 and 1; everything is read twice
    image_size: int = DataConfig.image_size  # H = W, pixels; pictures are brought to it by area
    frame_skip: int = 1  # rows of the source for one: every Nth picture, rewards summed
    skipped_actions: Literal["repeat", "concatenate"] = "repeat"  # of these rows: the first stands for all, or all become one of N A
    source_frame_skip: int = 1  # simulator steps for one row of the source, for the record
    domain: str = "converted"  # what the data are called; training asks for the same
    task: str | None = None  # the same; none: the name of the source
    max_episodes: int | None = None  # convert the first ones alone
    shortest: int = 1  # leave out and count episodes with fewer frames, such as those shorter than --sequence-length
    split: str | None = None  # train:95% keeps in the file how large a share trains; half of the rest validates, half is tested
    workers: int = 1  # processes that resize, compress and write
    resume: bool = False  # go on with the episodes that a conversion left in OUT.unfinished
    overwrite: bool = False  # replace an existing file, and drop the episodes of a conversion that ended early
    progress: bool = True  # show a progress bar


def main(argv: Sequence[str] | None = None) -> Path:
    """Parse `argv` (None: `sys.argv`), convert and print a summary; returns the file. Raises ConfigError, DataError."""
    options = parse_arguments(Conversion, PROG, "Convert recordings of other programs into one HDF5 file.", argv)
    _check(options)
    from aime_fast.data import DMCVBDataset
    from aime_fast.data.conversion import convert, file_attributes
    from aime_fast.data.files import writable_target
    from aime_fast.data.foreign import Names, detect, read
    from aime_fast.data.foreign.rlds import subset
    from aime_fast.data.split import held_out_attributes
    from aime_fast.data.unfinished import unfinished_folder
    from aime_fast.runtime.progress import episode_bar

    held_out = held_out_attributes(options.split)
    source, picture, is_folder = Path(options.source), options.out.with_suffix(".png"), not options.out.suffix
    left = unfinished_folder(options.out.resolve() if is_folder else writable_target(options.out))
    if is_folder and options.out.exists():
        raise DataError(f"--out {options.out}: the folder exists; name another, or remove it")
    if not options.overwrite and (existing := [path for path in (options.out, picture) if path.exists()]):
        raise DataError(f"--out {options.out}: the file {existing[0]} exists; pass --overwrite to replace it, or another --out")
    if source.is_dir() and options.out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"--out {options.out}: it lies in {source}, where it would be read as a part of it; name a place elsewhere")
    if left.exists() and not (options.overwrite or options.resume):
        raise DataError(f"--out {options.out}: an earlier conversion left episodes in {left}; pass --resume to keep them, or --overwrite")
    form = detect(source) if options.format == "auto" else options.format
    names = Names(_given(options), options.action_leads, options.image_size)

    def episodes() -> Iterator[Episode]:
        return itertools.islice(read(source, form, names), options.max_episodes)

    with episode_bar("finding the range of actions", options.progress and options.find_action_range, options.max_episodes) as advance:
        recipe = _recipe(options, episodes, advance)
    reading = {"map": names.given, "action_leads": options.action_leads, "max_episodes": options.max_episodes}
    task = options.task or subset(source) or source.resolve().stem
    attributes = file_attributes(source, form, recipe, options.domain, task, options.source_frame_skip, reading) | held_out
    attributes |= {} if options.camera is None else {"camera": options.camera}
    with episode_bar("converting", options.progress, options.max_episodes) as advance:
        converted = convert(episodes(), source, options.out, attributes, recipe, options.workers, options.resume, advance)
    _report(options, DMCVBDataset(options.out, 1), converted, task, picture)
    return options.out


def _check(options: Conversion) -> None:
    """Raises ConfigError where an option is out of range, or two exclude each other."""
    check(DataConfig(image_size=options.image_size, frame_skip=options.frame_skip, workers=options.workers))
    for name in ("max_episodes", "shortest", "source_frame_skip"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if options.action_range is not None:
        low, high = options.action_range
        if options.find_action_range:
            raise ConfigError(f"--action-range {low:g} {high:g} --find-action-range: pass one of them")
        if not low < high:
            raise ConfigError(f"--action-range {low:g} {high:g}: expected the lower number first")
    if options.resume and options.overwrite:
        raise ConfigError("--resume --overwrite: the one keeps episodes, the other drops them; pass one of them")
    if wrong := [pair for pair in options.map if "=" not in pair]:
        raise ConfigError(f"--map {wrong[0]}: expected WHAT=NAME, such as pixels=obs/agentview_image")
    if options.out.suffix not in ("", ".h5", ".hdf5"):
        raise ConfigError(f"--out {options.out}: expected a file NAME.h5 or NAME.hdf5, or a folder, NAME")


def _given(options: Conversion) -> dict[str, str]:
    """What `--map`, `--camera` and `--actions` say. Raises ConfigError where two of them say something of the same."""
    given = dict(pair.split("=", 1) for pair in options.map)
    for flag, what, name in (("camera", "pixels", options.camera), ("actions", "action", "none" if options.actions == "none" else None)):
        if name is not None and given.setdefault(what, name) != name:
            raise ConfigError(f"--{flag} {name} --map {what}={given[what]}: pass one of them")
    return given


def _recipe(options: Conversion, episodes: Callable[[], Iterator[Episode]], advance: Callable[[int], None]) -> Recipe:
    """What every episode is brought to; with `--find-action-range` all are read, and `advance` is called with the frames of each."""
    from aime_fast.data.conversion import Recipe, action_range

    def counted() -> Iterator[Episode]:
        for episode in episodes():
            advance(len(episode.action))
            yield episode

    low, high = options.action_range or UNIT
    lows, highs = action_range(counted()) if options.find_action_range else ((low,), (high,))
    concatenate = options.skipped_actions == "concatenate"
    return Recipe(options.image_size, lows, highs, options.frame_skip, concatenate, options.shortest)


def _report(options: Conversion, data: DMCVBDataset, converted: Converted, task: str, picture: Path) -> None:
    """Print what is in the file, and draw some of it."""
    from aime_fast.evaluation.pictures import write_png

    size = sum(path.stat().st_size for path in data.paths) / 2**20
    shown = sorted({data.num_episodes * k // SHEET[0] for k in range(SHEET[0])})
    write_png(picture, _sheet([_row(data.read_episode(i)["pixels"]) for i in shown]))
    print(
        f"{options.out}: {data.num_episodes} episodes of {min(data.lengths)} to {max(data.lengths)} frames, {sum(data.lengths)} in all, "
        f"{data.action_dim} actions, {size:.1f} MiB; {picture} shows some"
    )
    if converted.rewards:
        rewards = _rewards(data.paths)
        returns = [float(part.sum()) for part in rewards]
        least, largest = min(float(part.min()) for part in rewards), max(float(part.max()) for part in rewards)
        print(f"rewards {least:.3g} to {largest:.3g}, returns {min(returns):.3g} to {max(returns):.3g}")
    else:
        print("no rewards were recorded: zeros are stored, and what predicts rewards is not trained")
    if _given(options).get("action") == "none":
        print("no actions were recorded: one action is stored, always 0, so the model learns nothing of what an action does")
    if converted.too_short:
        print(f"{converted.too_short} episodes are left out, shorter than --shortest {options.shortest} frames")
    if converted.changed:
        print(f"the first action of {options.frame_skip} stands for all; they differ by up to {converted.changed:.3g} (--skipped-actions)")
    print(
        f"train on it with: python -m aime_fast.train --tier 1 --data {options.out} --domain {options.domain} --task {task} --frame-skip "
        f"{options.frame_skip * options.source_frame_skip} --image-size {options.image_size} --render-quality full"
        + ("" if options.camera is None else f" --camera {options.camera}")
    )


def _rewards(paths: Sequence[Path]) -> list[np.ndarray]:
    """Of each episode, without its pictures."""
    from aime_fast.data.episodes import episode_names, open_shard

    found = []
    for path in paths:
        with open_shard(path) as file:
            found += [file[name]["reward"][()] for name in episode_names(file, path)]
    return found


def _row(pixels: torch.Tensor) -> torch.Tensor:
    """Frames of an episode [T, 3, H, W], evenly spaced: uint8 [columns, H, W, 3]."""
    columns = SHEET[1]
    return pixels[[len(pixels) * k // columns for k in range(columns)]].permute(0, 2, 3, 1)


def _sheet(rows: list[torch.Tensor]) -> torch.Tensor:
    import torch

    from aime_fast.evaluation.pictures import enlarge, sheet

    return sheet(enlarge(torch.stack(rows), 64))


if __name__ == "__main__":
    run_command(main)
