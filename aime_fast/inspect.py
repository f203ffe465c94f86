"""What is in a data file, a run or a checkpoint, and what is wrong with it: `python -m aime_fast.inspect FILE|FOLDER|RUN|CHECKPOINT`.

Start it as a module: this folder on Python's search path would put this file before the standard library's `inspect`.
"""

from __future__ import annotations

if __name__ == "inspect":
    raise ImportError("aime_fast/ is on Python's search path; start its commands as modules: python -m aime_fast.inspect")

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from aime_fast.cli import parse_arguments, run_command
from aime_fast.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from aime_fast.data.faults import Fault

PROG = "python -m aime_fast.inspect"
Kind = Literal["data", "run", "checkpoint"]


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    target: Positional[tuple[str, ...]]  # HDF5 files or folders of them, which count as one data set; or one run; or one checkpoint
    verify: bool = False  # read every byte and compare all checksums; status 2 where something is damaged
    play: Path | None = None  # OUT.mp4: write an episode as a film with frame, action and reward
    episode: int = 0  # which one --play shows, as `index` of the table
    frames_per_second: int = 12  # of the film
    rows: int = 20  # of the table of episodes that are printed; 0: all
    json: bool = False  # print everything as one JSON object instead


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse `argv` (None: `sys.argv`), look, print; returns what `--json` prints.

    Raises: DataError, CheckpointError: the target cannot be read, or something in it is damaged or refused by training; ConfigError.
    """
    options = parse_arguments(InspectConfig, PROG, "Print what is in data, a run or a checkpoint, and what is wrong with it.", argv)
    targets = [Path(target) for target in options.target]
    _check(options)
    kinds = [kind_of(target) for target in targets]
    if len(targets) > 1 and set(kinds) != {"data"}:
        other = next(target for target, kind in zip(targets, kinds) if kind != "data")
        raise ConfigError(f"{other}: several names are taken as one data set, and this is a {kinds[targets.index(other)]}; give it alone")
    kind, name = kinds[0], " ".join(options.target)
    if options.play is not None and kind != "data":
        raise ConfigError(
            f"--play {options.play}: {name} is a {kind}, and --play shows recorded episodes; films of predictions are made by "
            f"`python -m aime_fast.evaluate {name}`"
        )
    facts, faults = _inspect(kind, targets, options)
    facts["faults"] = [dataclasses.asdict(fault) for fault in faults]
    if options.play is not None:
        facts["film"] = _play(options, facts)
    _print(facts, options)
    if refused := sum(fault.refused for fault in faults):
        error = DataError if kind == "data" else CheckpointError
        raise error(f"{name}: {'1 fault, named' if refused == 1 else f'{refused} faults, each named'} above with its remedy")
    return facts


def kind_of(target: Path) -> Kind:
    """What a name is the name of. Raises DataError, with the remedy, where it is none of the three."""
    from aime_fast.data.foreign import SUFFIXES as FOREIGN
    from aime_fast.data.foreign import detect
    from aime_fast.data.inspection import is_hdf5, is_run, shards_in

    if not target.exists():
        raise DataError(f"{target}: there is no such file or folder; give an HDF5 file of episodes, a run's folder or a checkpoint")
    if target.is_file():
        if ".pt" in target.suffixes:
            return "checkpoint"
        if is_hdf5(target):
            return "data"
    elif is_run(target):
        return "run"
    elif shards_in(target):
        return "data"
    elif runs := sorted(path.name for path in target.iterdir() if path.is_dir() and is_run(path)):
        raise DataError(f"{target}: it holds {len(runs)} runs; give one of them, such as {target / runs[0]}")
    try:
        form = detect(target)
    except DataError:
        form = None
    if form is not None:
        raise DataError(
            f"{target}: a recording of another program ({form}); convert it with `python -m aime_fast.convert {target} --out FILE`"
        )
    if target.is_dir():
        empty = "the folder is empty" if not any(target.iterdir()) else "neither episodes (.h5) nor a run are in this folder"
        raise DataError(f"{target}: {empty}; record episodes with `python -m aime_fast.collect`, or name another folder")
    known = ", ".join(sorted(FOREIGN))
    raise DataError(f"{target}: neither HDF5 nor a checkpoint (.pt); `python -m aime_fast.convert` reads {known}")


def _check(options: InspectConfig) -> None:
    """Raises ConfigError for what cannot be meant."""
    if not options.target:
        raise ConfigError("give a data file, a folder of them, a run's folder or a checkpoint")
    for name, least in (("episode", 0), ("frames_per_second", 1), ("rows", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}")
    if options.play is not None and options.play.suffix != ".mp4":  # a data file must not be replaced by a slip
        raise ConfigError(f"--play {options.play}: expected the name of a film to write, ending in .mp4")


def _inspect(kind: Kind, targets: list[Path], options: InspectConfig) -> tuple[dict[str, Any], list[Fault]]:
    if kind == "data":
        from aime_fast.data.inspection import inspect_data, shards_in
        from aime_fast.runtime.progress import episode_bar

        paths = [path for target in targets for path in (shards_in(target) if target.is_dir() else [target])]
        with episode_bar("reading", sys.stdout.isatty() and not options.json) as advance:
            return inspect_data(paths, options.verify, advance)
    if kind == "run":
        from aime_fast.training.run_inspection import inspect_run

        return inspect_run(targets[0], options.verify)
    from aime_fast.training.inspection import inspect_checkpoint

    return inspect_checkpoint(targets[0])


def _play(options: InspectConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the film; returns where it is and what it shows. Raises DataError where the episode cannot be read, OSError."""
    from aime_fast.data.inspection import read_raw
    from aime_fast.evaluation.playback import write_episode

    rows = facts["episode_table"]
    if options.episode >= len(rows):
        raise ConfigError(f"--episode {options.episode}: there are {len(rows)} episodes, numbered from 0 to {len(rows) - 1}")
    row = rows[options.episode]
    episode = read_raw(Path(row["file"]), row["episode"])
    write_episode(options.play, episode["pixels"], episode["action"], episode["reward"], options.frames_per_second)
    return {"path": str(options.play), "file": row["file"], "episode": row["episode"], "frames": len(episode["pixels"])}


def _print(facts: dict[str, Any], options: InspectConfig) -> None:
    if options.json:
        print(json.dumps(_plain(facts), indent=2, allow_nan=False, default=str))
        return
    from aime_fast.reporting import listing

    lines = {"data": lambda: listing.data_lines(facts, options.rows), "run": lambda: listing.run_lines(facts)}
    print("\n".join(lines.get(facts["kind"], lambda: listing.checkpoint_lines(facts))()))
    print()
    print("\n".join(listing.fault_lines(facts["faults"])))
    if film := facts.get("film"):
        print(f"\n{film['path']}: {film['frames']} frames of {film['episode']} of {film['file']}")


def _plain(value: Any) -> Any:
    """With numbers that JSON lacks as text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run_command(main)
