"""Record episodes of a dm_control task: `python -m aime_fast.collect --tier 1`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from aime_fast.cli import parse_arguments, run_command, tier_from
from aime_fast.config import Backend, DataConfig, NoiseKind, preset
from aime_fast.errors import ConfigError

if TYPE_CHECKING:
    from aime_fast.data.collectors import MakePolicy, Shard

PROG = "python -m aime_fast.collect"


@dataclass(frozen=True)
class Collection:
    """What to record. Defaults are those of the tier."""

    tier: str  # preset that the other values start from: 1, 2, 3 or debug
    domain: str  # dm_control domain
    task: str  # dm_control task
    episodes: int  # episodes to collect
    frame_skip: int  # simulator steps for one agent step; one frame is rendered for each agent step
    image_size: int  # H = W, pixels
    camera: str  # of the task, by number or name; -1: one that shows the whole scene
    render_quality: Literal["fast", "full"]  # fast: no anti-aliasing, shadows or reflections
    policy: str  # random, ou, swing, mixed (see train --help), or an online run or checkpoint, whose actor then acts with its noise
    workers: int  # collector processes
    # where they run: local, or distributed (they send by gloo): this machine; ray: the cluster of RAY_ADDRESS; slurm-array: this machine,
    # which records the shard that is this task's of a SLURM job array
    backend: Backend | Literal["slurm-array"] = "local"
    plan: bool = False  # with a run as --policy: choose each action by planning in its world model, by TorchRL's CEM (slow)
    seed: int = 0  # seed of initial states and actions
    shard: str = "1/1"  # I/N: every Nth of the episodes, from the Ith on, as one of N jobs; a folder of all shards is read as one
    split: str | None = None  # train:95% keeps in the file how large a share trains; half of the rest validates, half is tested
    out: Path | None = None  # HDF5 file to write; none: data/<domain>-<task>-seed<seed>.h5, of a shard data/.../shard<I>of<N>.h5
    overwrite: bool = False  # replace an existing file, and drop the episodes of a collection that ended early
    resume: bool = False  # go on with the episodes that a collection left in OUT.unfinished; does nothing if OUT is complete
    progress: bool = True  # show a progress bar


def main(argv: Sequence[str] | None = None) -> Path:
    """Parse `argv` (None: `sys.argv`), record the episodes and print a summary; returns the file. Raises DataError."""
    tier = tier_from(argv, "1")
    data = preset(tier).data
    shared = {field.name: getattr(data, field.name) for field in dataclasses.fields(Collection) if hasattr(data, field.name)}
    description = "Record episodes of a dm_control task into one HDF5 file."
    options = parse_arguments(Collection, PROG, description, argv, default=Collection(tier=tier, **shared))
    acts = options.policy not in get_args(NoiseKind)
    shared = {name: getattr(options, name) for name in shared} | ({"policy": data.policy} if acts else {})
    config: DataConfig = dataclasses.replace(data, **shared)
    if options.plan and not acts:
        raise ConfigError(f"--plan --policy {options.policy}: noise does not plan; name the folder or checkpoint of a run as --policy")
    in_array = options.backend == "slurm-array"
    shard, backend = _shard_of_array(options.shard) if in_array else _shard(options.shard), "local" if in_array else options.backend
    make_policy = _policy_of(options.policy, config, options.plan) if acts else None
    recording = f"{options.domain}-{options.task}-seed{options.seed}"
    of_shard = f"{recording}/shard{shard.index:03d}of{shard.count:03d}.h5"  # in a folder of their own, which is read as one
    out = options.out or Path("data") / (of_shard if shard.count > 1 else f"{recording}.h5")

    from aime_fast.data import DMCVBDataset, collect
    from aime_fast.data.files import writable_target
    from aime_fast.data.split import held_out_attributes
    from aime_fast.data.unfinished import unfinished_folder
    from aime_fast.errors import DataError

    held_out = held_out_attributes(options.split)
    complete, left = writable_target(out).exists(), unfinished_folder(writable_target(out))
    if options.resume and options.overwrite:
        raise DataError("--resume --overwrite: the one keeps episodes, the other drops them; pass one of them")
    if complete and not (options.overwrite or options.resume):
        raise DataError(f"--out {out}: the file exists; pass --overwrite to replace it, or another --out")
    if left.exists() and not (options.overwrite or options.resume):
        raise DataError(f"--out {out}: an earlier collection left episodes in {left}; pass --resume to keep them, or --overwrite")
    if not (complete and options.resume):
        name = (f"plan in {options.policy}" if options.plan else options.policy) if acts else None
        collect(config, options.seed, out, options.progress, options.resume, make_policy, name, shard, backend, held_out)
    recorded = DMCVBDataset(
        out, 1, **{key: getattr(config, key) for key in ("domain", "task", "image_size", "frame_skip", "camera", "render_quality")}
    )
    if recorded.num_episodes < (wanted := len(shard.of(config.episodes))):
        raise DataError(
            f"--out {out}: it holds {recorded.num_episodes} episodes, expected {wanted}; collect the others into a second file "
            f"with another --seed"
        )
    frames, seconds = sum(recorded.lengths), recorded.attributes["collection_seconds"]
    size = out.stat().st_size / 2**20
    print(f"{out}: {recorded.num_episodes} episodes, {frames} frames, {frames / seconds:.0f} frames/s, {size:.1f} MiB")
    return out


def _shard(text: str) -> Shard:
    """`--shard`. Raises ConfigError."""
    from aime_fast.data.collectors import Shard

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ConfigError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 1/3")
    return Shard(int(index), int(count))


def _shard_of_array(given: str) -> Shard:
    """The shard of this task of a SLURM job array. Raises ConfigError outside of one that is 1-N, or with `--shard`.

    A part of an array, submitted again, would record other shards: SLURM then tells the numbers of that part.
    """
    if given != Collection.shard:
        raise ConfigError(f"--shard {given} --backend slurm-array: the array says which shard this is; pass one of them")
    try:
        number, first, last, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "MAX", "COUNT"))
    except KeyError as error:
        raise ConfigError(
            f"--backend slurm-array: {error.args[0]} is not set; submit it with sbatch --array, or pass --shard I/N"
        ) from None
    if first != 1 or last != count:
        raise ConfigError(
            f"--backend slurm-array: the array's {count} tasks are numbered {first} to {last}, expected 1 to N, all of them; for some of "
            "them again pass --shard I/N"
        )
    return _shard(f"{number}/{count}")


def _policy_of(run: str, config: DataConfig, plans: bool) -> MakePolicy:
    """The actor of an online run, or a planner in a run's world model, once for each worker.

    Raises ConfigError or CheckpointError where it cannot play.
    """
    if not Path(run).exists():
        raise ConfigError(f"--policy {run}: expected {', '.join(get_args(NoiseKind))}, or the folder or checkpoint of an online run")
    from aime_fast.training.policies import check_fits, load_planning_policy, load_policy, make_planning_policy, make_recording_policy

    _, trained, _ = (load_planning_policy if plans else load_policy)(run)
    check_fits(run, trained.data, config)
    return partial(make_planning_policy if plans else make_recording_policy, run)


if __name__ == "__main__":
    run_command(main)
