"""Which episodes train, validate and are tested: decided by their content and a seed of its own, not by the order of files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aime_fast.config import DataConfig
from aime_fast.errors import ConfigError, DataError


class Split(NamedTuple):
    """Identities of episodes (`DMCVBDataset.identities`); none is in two parts."""

    training: tuple[str, ...]
    validation: tuple[str, ...]  # chooses: hyper-parameters, checkpoints
    test: tuple[str, ...]  # is reported: nothing in training reads it


def saved_split(state: Mapping[str, Any]) -> Split:
    """The split that a checkpoint names."""
    return Split(**{part: tuple(identities) for part, identities in state["split"].items()})


def held_out_shares(config: DataConfig, kept: Mapping[str, Any]) -> tuple[float, float]:
    """Shares of the episodes that validate and that are tested: those of the config where they are not its defaults, else those that the
    attributes of the file keep (`aime_fast.convert --split`), if any."""
    names = ("validation_fraction", "test_fraction")
    given = {name: getattr(config, name) for name in names}
    default = all(given[name] == getattr(DataConfig, name) for name in names)
    return tuple(float(kept.get(name, given[name]) if default else given[name]) for name in names)


def held_out_attributes(text: str | None) -> dict[str, float]:
    """Attributes of a file by `--split train:SHARE%`: half of the rest validates, half is tested; none by None. Raises ConfigError."""
    if text is None:
        return {}
    part, _, share = text.partition(":")
    number = share.removesuffix("%")
    if part != "train" or not share.endswith("%") or not number.replace(".", "", 1).isdecimal() or not 0 < float(number) < 100:
        raise ConfigError(f"--split {text}: expected train:SHARE% with a share between 0 and 100, such as train:95%")
    rest = (100 - float(number)) / 200
    return {"validation_fraction": rest, "test_fraction": rest}


def split_episodes(identities: Sequence[str], validation_fraction: float, test_fraction: float, seed: int) -> Split:
    """Splits a data set; at least one episode goes to each part, and a recording that is there twice counts once.

    Episodes are ordered by a hash of seed and identity, so the same episodes in other files are split alike.

    Raises:
        DataError: fewer than three different episodes.
    """
    order = sorted(set(identities), key=lambda identity: hashlib.sha256(f"{seed}/{identity}".encode()).digest())
    n = len(order)
    if n < 3:
        raise DataError(f"--data holds {n} different episodes, expected at least 3: one each to train, to validate and to test on")
    tested = min(max(1, round(test_fraction * n)), n - 2)
    validated = min(max(1, round(validation_fraction * n)), n - 1 - tested)
    return Split(tuple(order[tested + validated :]), tuple(order[tested : tested + validated]), tuple(order[:tested]))


def find_episodes(part: Sequence[str], identities: Sequence[str], data: str) -> list[int]:
    """Index of each episode of a part in `identities`. Raises DataError if one is missing."""
    places = {identity: index for index, identity in reversed(list(enumerate(identities)))}
    if missing := [identity for identity in part if identity not in places]:
        raise DataError(
            f"--data {data}: {len(missing)} of {len(part)} episodes that this run was split into are missing (the first is {missing[0]}); "
            "give the data of the run with --data"
        )
    return [places[identity] for identity in part]


def check_disjoint(identities: Sequence[str], split: Split, data: str) -> None:
    """Raise DataError if one of these episodes is a training episode of the split."""
    if shared := set(identities) & set(split.training):
        raise DataError(
            f"--data {data}: {len(shared)} of its {len(set(identities))} episodes are training episodes of the run, which would measure "
            "what it was trained on; give other data, or leave --data out to use the run's test episodes"
        )
