"""The shards of TFDS data sets under a folder, and how many records each should hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

from aime_fast.data.foreign.episode import readable
from aime_fast.errors import DataError

SHARD = re.compile(r"(?P<stem>.+)\.tfrecord-(?P<index>\d+)-of-(?P<count>\d+)")  # the stem ends in -SPLIT
FILE = re.compile(r".+\.tfrecord(-\d+(-of-\d+)?)?")  # not what others put beside them, such as an index
VERSION = re.compile(r"\d+\.\d+\.\d+")


def find_shards(source: Path) -> dict[Path, list[Path]]:
    """The folder of each data set and its shards, by name; or one shard. Raises DataError where one is missing or versions are mixed."""
    if source.is_file():
        return {source.parent: [source]}
    folders: dict[Path, list[Path]] = {}
    for path in sorted(path for path in source.rglob("*.tfrecord*") if path.is_file() and FILE.fullmatch(path.name)):
        folders.setdefault(path.parent, []).append(path)
    if not folders:
        raise DataError(f"{source}: no *.tfrecord* in it; give the folder that holds features.json and the shards")
    for folder, paths in folders.items():
        versions = sorted(other.name for other in folders if other.parent == folder.parent and VERSION.fullmatch(other.name))
        if len(versions) > 1:
            raise DataError(f"{folder.parent}: versions {' and '.join(versions)} of one data set; give the folder of one of them")
        _check_complete(folder, paths)
    return folders


def _check_complete(folder: Path, paths: list[Path]) -> None:
    names = {path.name for path in paths}
    for match in filter(None, (SHARD.fullmatch(name) for name in sorted(names))):
        for index in range(int(match["count"])):
            name = f"{match['stem']}.tfrecord-{index:0{len(match['index'])}d}-of-{match['count']}"
            if name not in names:
                raise DataError(f"{folder / name}: missing, {match[0]} is there; copy it, or convert the shards one by one")


def expected_records(path: Path) -> int | None:
    """How many records `dataset_info.json` says a shard holds; None: it does not say. Raises DataError where that file is damaged."""
    info, match = path.parent / "dataset_info.json", SHARD.fullmatch(path.name)
    if not info.exists() or match is None:
        return None
    with readable(str(info)):
        splits = {split["name"]: split.get("shardLengths", []) for split in json.loads(info.read_text()).get("splits", [])}
        lengths = splits.get(match["stem"].rpartition("-")[2], [])
        return int(lengths[int(match["index"])]) if len(lengths) == int(match["count"]) else None
