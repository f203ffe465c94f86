"""What `aime_fast.inspect` has found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WORDS = {"looked_at": "looked at", "plain": "of one colour", "repeated": "equal to the one before"}
ALWAYS = 20  # findings of one kind that are printed; of those that training refuses, all are


def data_lines(facts: Mapping[str, Any], rows: int) -> list[str]:
    """Of a data set; `rows`: of the table of episodes, 0 for all."""
    a, files = facts["attributes"], facts["files"]
    pictures, lengths = facts["pictures"], facts["lengths"]
    storage = "; ".join(f"{each['codec']}, chunks {_shape(each['chunks'])}" for each in facts["storage"])
    recorded = "" if facts["rewards_recorded"] else " (none were recorded)"
    known = ("domain", "task", "frame_skip", "image_size", "action_dim", "policy", "versions")
    pairs = {
        "what": f"{a.get('domain')} {a.get('task')}, frame skip {a.get('frame_skip')}, policy {a.get('policy', 'not said')}",
        **{key.replace("_", " "): _value(value) for key, value in a.items() if key not in known and value not in ((), "")},
        "versions": _pairs(a["versions"]) if isinstance(a.get("versions"), Mapping) else "",
        "lengths": f"{lengths['least']:g} to {lengths['largest']:g} frames, median {lengths['median']:g}" if lengths else "",
        "pictures": f"{facts['image_size']} x {facts['image_size']}; {_count(pictures, facts['frames'], facts['re_read'])}",
        "rewards": _spread(facts["rewards"]) + recorded,
        "returns": _spread(facts["returns"]),
        "discounts": f"{_spread(facts['discounts'])}; {facts['terminal_episodes']} of {facts['episodes']} episodes end in a terminal state",
        "storage": f"{_bytes(facts['bytes'])}, {_number(facts['bytes_per_frame'])} bytes a frame; pixels: {storage}",
        "checksums": f"format {facts['format_version']}; {_checked(facts)}",
        "held out": _pairs(facts["held_out"]) if facts["held_out"] else "no shares are stored; training's settings decide",
    }
    actions = [{"action": str(i), **each} for i, each in enumerate(facts["actions"]) if each]
    first = f"{files[0]}{f' and {len(files) - 1} more files' if len(files) > 1 else ''}"
    lines = [f"{first}: {facts['episodes']} episodes, {facts['frames']} frames", *_facts(pairs), ""]
    lines += [*table(actions, ("action", "least", "largest", "mean", "std")), ""]
    shown = [{**row, **row["pictures"], "file": row["file"].rsplit("/", 1)[-1]} for row in facts["episode_table"]]
    columns = ["index", *(["file"] if len(files) > 1 else []), "episode", "frames", "return", "terminals", "bytes"]
    lines += table(shown[: rows or None], [*columns, "looked_at", "black", "plain", "repeated", "identity", "checked"])
    if rows and len(shown) > rows:
        lines.append(f"and {len(shown) - rows} more episodes; --rows 0 prints all")
    return lines


def run_lines(facts: Mapping[str, Any]) -> list[str]:
    """Of a run."""
    planned = " or ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in facts["planned"].items() if value is not None)
    cycles = "" if facts["cycles"] is None else f", {facts['cycles']} cycles"
    resume, episodes = facts["resume"], facts["episodes"]
    pairs = {
        **{key.replace("_", " "): _value(value) for key, value in facts["facts"].items()},
        "versions": _pairs(facts["versions"]),
        "settings": _pairs(facts["settings"]),
        "progress": f"step {facts['step']}{cycles}{f' of {planned} planned' if planned else ''}, resumed {facts['resumed']} times",
        "results": ", ".join(facts["results"]) or f"none yet; python -m aime_fast.evaluate {facts['folder']}",
        "pictures": f"{facts['samples']} in samples/{', and a TensorBoard log' if facts['tensorboard'] else ''}",
    }
    if episodes:
        frames = f", {episodes['frames']} frames, {_pairs(episodes['checked'])}" if episodes["frames"] is not None else ", not re-read"
        pairs["episodes"] = f"{episodes['files']} in episodes/, {_bytes(episodes['bytes'])}{frames}"
    pairs["go on"] = f"from {resume['checkpoint']}: {resume['command']}" if resume else "no whole checkpoint is there"
    metrics = [{"metric": name, **each} for name, each in facts["metrics"].items()]
    lines = [f"{facts['folder']}: {'an online run' if facts['online'] else 'a run'}, {facts['rows']} rows of metrics", *_facts(pairs), ""]
    lines += [*table(metrics, ("metric", "value", "step")), ""]
    return lines + table([{**each, "bytes": _bytes(each["bytes"])} for each in facts["checkpoints"]], ("name", "step", "bytes", "checked"))


def checkpoint_lines(facts: Mapping[str, Any]) -> list[str]:
    """Of a checkpoint."""
    total = sum(facts["parameters"].values())
    played = facts["environment_frames"]
    pairs = {
        "place": f"step {facts['step']}, epoch {_number(facts['epoch'])}, {_number(facts['seconds'])} s"
        + (f", cycle {facts['cycle']}, {played} environment frames" if facts["online"] else ""),
        "settings": _pairs(facts["settings"]),
        "actions": str(facts["action_dim"]),
        "weights": f"{', '.join(facts['dtypes'])}{', and their moving average' if facts['average'] else ''}",
        "training": "can go on from it: the state of the optimizers is there" if facts["optimizer"] else "cannot go on: weights only",
        "latent phase": facts["latent_phase"] or "not made",
        "episodes": _pairs(facts["split"]),
        "checksums": f"format {facts['format']}; every byte was read, and its checksum is right",
    }
    rows = [{"pillar": name, facts["parameters_counted"]: count} for name, count in facts["parameters"].items()]
    rows.append({"pillar": "in all", facts["parameters_counted"]: total})
    return [f"{facts['file']}: a checkpoint, {_bytes(facts['bytes'])}", *_facts(pairs), "", *table(rows, tuple(rows[0]))]


def fault_lines(faults: Sequence[Mapping[str, Any]]) -> list[str]:
    """Findings that training refuses first, all of them; then what only looks wrong."""
    if not faults:
        return ["no faults found"]
    bad, odd = ([fault for fault in faults if fault["refused"] is refused] for refused in (True, False))
    lines = [f"faults: {len(bad)}"] if bad else []
    lines += [f"  {fault['message']}" for fault in bad]
    lines += [f"looks wrong: {len(odd)}"] if odd else []
    for kind in dict.fromkeys(fault["kind"] for fault in odd):
        alike = [fault for fault in odd if fault["kind"] == kind]
        lines += [f"  {fault['message']}" for fault in alike[:ALWAYS]]
        lines += [f"  and {len(alike) - ALWAYS} more of this kind ({kind}); --json has all"] if len(alike) > ALWAYS else []
    return lines


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Aligned columns under their names, numbers to the right; nothing where there are no rows."""
    if not rows:
        return []
    cells = [[_number(row.get(name)) for name in columns] for row in rows]
    heads = [WORDS.get(name, name) for name in columns]
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in columns]

    def line(values: Iterable[str]) -> str:
        parts = (value.rjust(width) if right else value.ljust(width) for value, width, right in zip(values, widths, numeric))
        return f"  {'  '.join(parts)}".rstrip()

    return [line(heads), *map(line, cells)]


def _facts(pairs: Mapping[str, str]) -> list[str]:
    shown = {name: text for name, text in pairs.items() if text}
    width = max(map(len, shown))
    return [f"  {name.ljust(width)}  {text}" for name, text in shown.items()]


def _checked(facts: Mapping[str, Any]) -> str:
    states = ", ".join(f"{count} {state}" for state, count in facts["checked"].items())
    return f"every byte was read: {states}" if facts["re_read"] else f"{states}; --verify reads every picture and compares all checksums"


def _count(pictures: Mapping[str, int], frames: int, re_read: bool) -> str:
    """Counts of pictures, in words."""
    found = ", ".join(f"{pictures[name]} {WORDS.get(name, name)}" for name in ("black", "plain", "repeated"))
    sample = "" if pictures["looked_at"] == frames else " (the others are damaged)" if re_read else " (a sample; --verify looks at all)"
    return f"{pictures['looked_at']} of {frames} looked at{sample}: {found}"


def _spread(spread: Mapping[str, float] | None) -> str:
    return f"{spread['least']:.4g} to {spread['largest']:.4g}, mean {spread['mean']:.4g}" if spread else "unknown"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in values.items() if value is not None)


def _value(value: Any) -> str:
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else _number(value)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _bytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"


def _shape(chunks: Sequence[int] | None) -> str:
    return " x ".join(map(str, chunks)) if chunks else "none"
