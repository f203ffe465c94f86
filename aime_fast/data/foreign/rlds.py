"""RLDS episodes as TFDS wrote them: TFRecord shards, a record an episode, with `features.json` and `dataset_info.json` beside them. DMC-VB.

RLDS: step t holds picture t, the action taken after it and the reward that this brought; in the step that `is_last` marks both are
meaningless, and `is_terminal` is about its picture (google-research/rlds, README). TFDS stores column NAME of steps as `steps/NAME`, one
step after the other.

DMC-VB (google-deepmind/dmc_vision_benchmark: README, data/load_dmc_vb.py, data/dmc_vb_info.py): a folder a subset, such as
`locomotion/cheetah_run/expert/dynamic_medium`, split `train`, pictures of 64 x 64. Cameras: `pixels` for locomotion, for ant mazes
`lowres_top_camera`, `walker/egocentric_camera`, `walker/follow_camera`, and each with `_hidden_target`. Its loader gives an action the
reward of the following step (data/preprocessing.py, `transform_extract_frame_stack`), as if a reward lay beside the picture that it came
with, as in dm_env. For data like that `next/NAME` takes the value of the following step.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aime_fast.data.foreign import tfrecord
from aime_fast.data.foreign.episode import LAST, MOVED, NEXT, Episode, Names, build, readable
from aime_fast.data.foreign.shards import expected_records, find_shards
from aime_fast.errors import DataError

STEPS = "steps/"
KINDS = ("locomotion", "antmaze")  # folders of DMC-VB's subsets


class Feature(NamedTuple):
    """A column of steps, as `features.json` says."""

    shape: tuple[int, ...]  # of one step; -1: any size, of pictures alone
    dtype: str
    coding: str  # none: numbers; image: PNG or JPEG; bytes, zlib: a byte string a step


class Columns(NamedTuple):
    """Which column is what."""

    names: dict[str, str]  # as in `episode.KNOWN`, and `last`
    features: dict[str, Feature]  # of these
    following: frozenset[str]  # what is taken from the following step
    sure: bool  # --map says where the reward is

    def described(self) -> str:
        return ", ".join(f"{name} {self.features[what].dtype} {list(self.features[what].shape)}" for what, name in self.names.items())


def read(source: Path, names: Names) -> Iterator[Episode]:
    """Episodes of a shard, or of all data sets of a folder, whose features must be alike; by name."""
    folders = find_shards(source)
    columns = {folder: _columns(folder / "features.json", names) for folder in folders}
    first = next(iter(folders))
    if other := next((folder for folder in folders if columns[folder] != columns[first]), None):
        raise DataError(f"{other}: {columns[other].described()}, in {first} {columns[first].described()}; convert them apart")
    counts = {path: expected_records(path) for paths in folders.values() for path in paths}
    for path, expected in counts.items():
        number = -1
        for number, payload in tfrecord.records(path):
            where = f"{path}: record {number}"
            with readable(where):
                recorded = tfrecord.features(payload)
                arrays = _arrays(where, recorded, columns[path.parent])
            yield _episode(where, arrays, columns[path.parent], bool(names.leads))
        if expected is not None and number + 1 != expected:
            raise DataError(f"{path}: {number + 1} records, dataset_info.json says {expected}; copy it again, or leave it out")


def as_dmc_vb(source: Path, names: Names) -> Names:
    """These names, and rewards taken from the following step, if there are any, as DMC-VB's loader takes them. Raises DataError."""
    columns = _columns(next(iter(find_shards(source))) / "features.json", names)
    reward = columns.names.get("reward")
    return names if reward is None else names._replace(given={**names.given, "reward": NEXT + reward})


def subset(source: Path) -> str | None:
    """What a folder of DMC-VB is called, as `cheetah_run-expert-none`: of its data, what lies below `KINDS`; None elsewhere."""
    parts = source.resolve().parts
    below = next((parts[i + 1 :] for i in reversed(range(len(parts))) if parts[i] in KINDS), ())
    return "-".join(below) or None


def _columns(path: Path, names: Names) -> Columns:
    """What is what by `features.json`, `--map` and known names. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: missing; it says what is in the shards, copy it beside them")
    with readable(str(path)):
        try:
            features = json.loads(path.read_text())["featuresDict"]["features"]["steps"]["sequence"]["feature"]
        except KeyError as error:
            raise DataError(f"{path}: no {error} in it, expected the features of RLDS steps as TFDS writes them") from error
        present = dict(_flattened(features, ""))
    plain, following = names.following(list(present))
    found = plain.choose(list(present), str(path))
    found[LAST] = plain.given.get(LAST, "is_last")
    if found[LAST] not in present:
        raise DataError(f"{path}: which column marks the last step? there are {', '.join(present)}; say so with --map last=NAME")
    if "terminal" in found and "discount" not in names.given:
        found.pop("discount", None)  # a discount may be that of a method; what is terminal is certain
    return Columns(found, {what: present[name] for what, name in found.items()}, following, "reward" in names.given)


def _flattened(feature: Mapping[str, Any], name: str) -> Iterator[tuple[str, Feature]]:
    """Columns that can be read: numbers of known shape, and pictures; not text, nor what varies in length."""
    if "featuresDict" in feature:
        for key, inner in feature["featuresDict"]["features"].items():
            yield from _flattened(inner, f"{name}/{key}" if name else key)
    content = feature.get("tensor") or feature.get("image")
    if content is None:
        return
    shape = tuple(int(size) for size in content["shape"].get("dimensions", ()))
    coding = "image" if "image" in feature else content.get("encoding", "none")
    dtype = content.get("dtype", "uint8")
    if coding == "image" or (re.fullmatch(r"bool|u?int(8|16|32|64)|float(16|32|64)", dtype) and all(size >= 0 for size in shape)):
        yield name, Feature(shape, dtype, coding)


def _arrays(where: str, recorded: Mapping[str, Any], columns: Columns) -> dict[str, np.ndarray]:
    """The columns of an episode [T, ...], of the shapes and dtypes that `features.json` says. Raises DataError."""
    held = {}
    for what, name in columns.names.items():
        if STEPS + name not in recorded:
            raise DataError(f"{where}: {STEPS}{name} is missing, features.json has it; copy both again, from the same data set")
        held[what] = tfrecord.values(recorded[STEPS + name])
    steps = len(held[LAST])
    if not steps:
        raise DataError(f"{where}: an episode without steps; leave it out")
    return {what: _array(f"{where}: {STEPS}{columns.names[what]}", held[what], columns.features[what], steps) for what in held}


def _array(where: str, held: tfrecord.Values, feature: Feature, steps: int) -> np.ndarray:
    """[T, *shape]."""
    coded = feature.coding != "none"
    count = steps if coded else steps * int(np.prod(feature.shape))
    if (isinstance(held, list) != coded and count) or len(held) != count:
        what = "byte strings" if isinstance(held, list) else "numbers"
        raise DataError(
            f"{where}: {len(held)} {what}, features.json says {count} {'byte strings' if coded else 'numbers'}, {steps} steps of "
            f"{feature.dtype} {list(feature.shape)}; copy both again, from the same data set"
        )
    if not coded:
        return np.asarray(held).astype(feature.dtype).reshape(steps, *feature.shape)
    decoded = [_decoded(part, feature) for part in held]
    shape = decoded[0].shape if -1 in feature.shape else feature.shape
    for t, part in enumerate(decoded):
        if part.shape != shape:
            raise DataError(f"{where}: step {t} has shape {list(part.shape)}, expected {list(shape)}; copy features.json and shards again")
    return np.stack(decoded)


def _decoded(part: bytes, feature: Feature) -> np.ndarray:
    if feature.coding == "image":
        from PIL import Image

        picture = np.asarray(Image.open(BytesIO(part)))
        return picture[..., None] if picture.ndim == 2 else picture
    flat = np.frombuffer(zlib.decompress(part) if feature.coding == "zlib" else part, feature.dtype)
    return flat.reshape(feature.shape) if flat.size == np.prod(feature.shape) else flat


def _episode(where: str, arrays: dict[str, np.ndarray], columns: Columns, leads: bool) -> Episode:
    """An episode of the steps after whose pictures an action and what it brought are known."""
    last, first = arrays.pop(LAST).reshape(-1), arrays.pop("first", None)
    steps = len(last)
    for flag, rows, expected in (("first", first, 0), (LAST, last, steps - 1)):
        marked = [] if rows is None else np.flatnonzero(rows).tolist()
        if marked not in ([], [expected]):
            raise DataError(f"{where}: {columns.names[flag]} at rows {marked} of {steps}, expected one episode a record")
    if leads:
        return build(where, arrays, leads=True)
    ended = bool(last[-1])
    reward = arrays.get("reward")
    if ended and reward is not None and not columns.sure and reward.flat[0] == 0 and reward.flat[-1] != 0:
        name = columns.names["reward"]
        raise DataError(
            f"{where}: the first {name} is 0, that of the last step {reward.flat[-1]:g}, so rewards seem to lie where dm_env has them, "
            f"with the pictures they led to; if so pass --map reward={NEXT}{name}, if they follow their rows' actions --map reward={name}"
        )
    if "terminal" in arrays:  # what an action brought is marked with the next picture
        arrays["terminal"] = np.append(arrays["terminal"].reshape(-1)[1:], False)
    if ended:
        arrays |= {what: arrays[what][:-1] for what in {*MOVED} - columns.following if what in arrays}
    return build(where, arrays, leads=False, following=columns.following)
