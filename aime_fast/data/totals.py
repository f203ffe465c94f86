"""What a whole data set amounts to, and what looks wrong when its episodes are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aime_fast.config import DataConfig
from aime_fast.data.episodes import UNRECORDED
from aime_fast.data.faults import Fault, Place
from aime_fast.data.split import Split

PARTS = len(Split._fields)  # so many episodes does training want
SHORT = DataConfig.sequence_length  # frames; a shorter episode gives no training sequence of the usual length
HIDDEN = ("attributes_sha256", "complete", "validation_fraction", "test_fraction", "format_version")  # attributes with a place of their own
Row = dict[str, Any]
Episode = Mapping[str, np.ndarray]


def totals(
    paths: Sequence[Path],
    rows: list[Row],
    episodes: list[Episode],
    attributes: Mapping[str, Any],
    storage: list[dict[str, Any]],
    verify: bool,
) -> dict[str, Any]:
    """All of it as plain values that JSON has; what no readable episode tells is None.

    `lengths`, `returns`, `rewards`, `discounts`: least, largest and so on; `actions`: a dictionary each; `pictures`: counts over those
    looked at; `checked`: episodes by state; `held_out`: shares that `convert --split` stored, or None.
    """
    lengths = [row["frames"] for row in rows if row["frames"] is not None]
    returns = [row["return"] for row in rows if row["return"] is not None]
    size = sum(path.stat().st_size for path in paths if path.exists())
    held = {key: attributes[key] for key in ("validation_fraction", "test_fraction") if key in attributes}
    action = _joined(episodes, "action")
    return {
        "kind": "data",
        "files": [str(path) for path in paths],
        "format_version": attributes.get("format_version"),
        "attributes": {key: value for key, value in sorted(attributes.items()) if key not in HIDDEN},
        "episodes": len(rows),
        "frames": sum(lengths),
        "lengths": _spread(np.array(lengths, np.float64)),
        "image_size": attributes.get("image_size"),
        "actions": [] if action is None else [_spread(each) for each in action.T],
        "rewards": _spread(_joined(episodes, "reward")),
        "rewards_recorded": attributes.get("rewards") != UNRECORDED,
        "returns": _spread(np.array(returns, np.float64)),
        "discounts": _spread(_joined(episodes, "discount")),
        "terminal_frames": sum(row["terminals"] or 0 for row in rows),
        "terminal_episodes": sum(bool(row["terminals"]) for row in rows),
        "pictures": {key: sum(row["pictures"][key] for row in rows) for key in ("looked_at", "black", "plain", "repeated")},
        "bytes": size,
        "bytes_per_frame": size / sum(lengths) if lengths else None,
        "storage": list({str(each): each for each in storage}.values()),
        "held_out": held or None,
        "re_read": verify,
        "checked": {state: sum(row["checked"] == state for row in rows) for state in dict.fromkeys(row["checked"] for row in rows)},
        "episode_table": rows,
    }


def _joined(episodes: list[Episode], key: str) -> np.ndarray | None:
    found = [episode[key] for episode in episodes if key in episode]
    if len({part.shape[1:] for part in found}) > 1:
        return None  # files of other numbers of actions, which is a fault of its own
    return np.concatenate(found).astype(np.float64) if found else None


def _spread(values: np.ndarray | None) -> dict[str, float] | None:
    """Of the finite ones."""
    values = values[np.isfinite(values)] if values is not None else np.zeros(0)
    if not values.size:
        return None
    names = {"least": np.min, "median": np.median, "largest": np.max, "mean": np.mean, "std": np.std}
    return {name: float(of(values)) for name, of in names.items()}


def between_episodes(rows: list[Row], episodes: list[Episode], attributes: Mapping[str, Any]) -> Iterator[Fault]:
    """Short episodes, equal ones, actions and rewards without variation."""
    seen: dict[str, Row] = {}
    for row in rows:
        place = Place(Path(row["file"]), row["episode"])
        if row["frames"] is not None and row["frames"] < SHORT:
            remedy = f"it is left out of training unless --sequence-length is {row['frames']} or less"
            yield place.fault(
                "short", False, f"{row['frames']} frames, fewer than the usual sequence of {SHORT}", remedy, value=row["frames"]
            )
        if row["identity"] is not None and (first := seen.setdefault(row["identity"], row)) is not row:
            said = f"the same content as {first['episode']} of {first['file']} (checksum {row['identity']})"
            yield place.fault(
                "identical", False, said, "it counts once when episodes are held out, and twice in training; drop one of them"
            )
    if (known := {row["identity"] for row in rows if row["identity"] is not None}) and len(known) < PARTS:
        said = f"{len(known)} different episodes, training wants {PARTS}: one each to train, to validate and to test on"
        yield Fault("few", False, f"{rows[0]['file']}: {said}; record or convert more, and give all files with --data", rows[0]["file"])
    yield from _constant_actions(rows, episodes)
    yield from _constant_rewards(rows, episodes, attributes)


def _constant_actions(rows: list[Row], episodes: list[Episode]) -> Iterator[Fault]:
    ranges = [
        (row, episode["action"].min(0), episode["action"].max(0))
        for row, episode in zip(rows, episodes)
        if len(episode.get("action", ())) > 1
    ]
    if len({low.shape for _, low, _ in ranges}) != 1:
        return
    low, high = np.min([low for _, low, _ in ranges], 0), np.max([high for _, _, high in ranges], 0)
    everywhere = low == high
    check = "the model cannot learn what it does; check what was recorded as the action"
    for number in np.flatnonzero(everywhere):
        row, value = ranges[0][0], float(low[number])
        said = f"action {number} is {value:g} here and in each of {len(ranges)} episodes"
        yield Place(Path(row["file"]), row["episode"]).fault("constant action", False, said, check, 0, value)
    for row, least, largest in ranges:
        if len(same := np.flatnonzero((least == largest) & ~everywhere)):
            which = "every action" if len(same) == len(least) > 1 else f"action {', '.join(map(str, same))}"
            said = f"{which} is constant, at {', '.join(f'{value:g}' for value in least[same][:6])}"
            yield Place(Path(row["file"]), row["episode"]).fault("constant action", False, said, check, 0, float(least[same[0]]))


def _constant_rewards(rows: list[Row], episodes: list[Episode], attributes: Mapping[str, Any]) -> Iterator[Fault]:
    if attributes.get("rewards") == UNRECORDED:
        return
    known = [(row, episode["reward"]) for row, episode in zip(rows, episodes) if len(episode.get("reward", ())) > 1]
    if constant := [(row, float(reward[0])) for row, reward in known if (reward == reward[0]).all()]:
        row, value = constant[0]
        said = f"reward is {value:g} in each frame, the first of {len(constant)} of {len(known)} episodes without variation"
        every = len(constant) == len(known) and len({value for _, value in constant}) == 1
        remedy = "nothing can be learnt from rewards that are all alike" if every else "normal where rewards are rare"
        yield Place(Path(row["file"]), row["episode"]).fault("constant reward", False, said, remedy, 0, value)
