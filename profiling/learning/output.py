"""The results of `profiling.bench learning` as a table, as curves and as filmstrips."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aime_fast.data import normalise
from aime_fast.evaluation.clips import Clips, spread
from aime_fast.evaluation.films import predict
from aime_fast.evaluation.pictures import enlarge, paint_border, sheet, to_uint8, write_png
from profiling.learning.scores import rows

COSTS = {
    "parameters": "parameters, millions",
    "minutes": "processor minutes",
    "updates": "joint updates",
    "frames": "frames trained on, thousands",
    "speed": "frames a processor second, all included",
}
COLUMNS = 10  # of a filmstrip


def summary(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows of the table: label -> contestant -> {mean, least, most, of_seeds}; one result a seed, as `bench_learning` has them."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name in results[0]["contestants"]:
        each = [_values(result["contestants"][name]) for result in results]
        for label in each[0]:
            values = [found[label] for found in each]
            table.setdefault(label, {})[name] = mean_and_range(values)
    return table


def mean_and_range(values: Sequence[float | None]) -> dict[str, Any]:
    """{mean, least, most, of_seeds} of one value a seed; the last alone where none is known."""
    known = [value for value in values if value is not None]
    of = {"mean": statistics.fmean(known), "least": min(known), "most": max(known)} if known else {}
    return of | {"of_seeds": list(values)}


def _values(contestant: Mapping[str, Any]) -> dict[str, float | None]:
    cost = contestant["cost"]
    shown = {
        "parameters": cost["parameters"] / 1e6,
        "minutes": cost["seconds"] / 60,
        "updates": cost["updates"],
        "frames": cost["frames"] / 1e3,
        "speed": cost["frames"] / cost["seconds"],
    }
    return {COSTS[name]: value for name, value in shown.items()} | rows(contestant["test"])


def table(summarised: Mapping[str, Mapping[str, Mapping[str, Any]]], head: Sequence[str]) -> str:
    """Markdown: lines of `head`, then one row a measure: the mean over seeds and, of several, the range."""
    names = list(dict.fromkeys(name for found in summarised.values() for name in found))
    lines = [*head, "", f"| measure | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for label, found in summarised.items():
        lines.append(f"| {label} | {' | '.join(cell(found.get(name, {})) for name in names)} |")
    return "\n".join(lines) + "\n"


def cell(found: Mapping[str, Any]) -> str:
    """What `mean_and_range` gave, as a cell of a table: the mean and, of several seeds, the range."""
    if "mean" not in found:
        return "–"
    several = len(found["of_seeds"]) > 1
    return f"{found['mean']:.3g}" if not several else f"{found['mean']:.3g} ({found['least']:.3g} to {found['most']:.3g})"


def write_curves(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """PNG: validation PSNR of reconstructions, and gain of predicted films, over processor minutes and over frames; a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure((11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row", sharex="col")
    kinds = {"reconstruction_psnr": "reconstruction, PSNR dB", "gain": "film: gain on the better baseline,\nsteps 5 to 16, dB"}
    costs = {"seconds": ("processor minutes", 60), "frames": ("thousand frames", 1000)}
    for (kind, y_label), row in zip(kinds.items(), axes):
        for (cost, (x_label, unit)), axis in zip(costs.items(), row):
            for number, name in enumerate(results[0]["contestants"]):
                for result in results:
                    points = [point for point in result["contestants"][name]["curve"] if point[kind] is not None]
                    label = name if result is results[0] else None
                    x, y = [point[cost] / unit for point in points], [point[kind] for point in points]
                    axis.plot(x, y, marker=".", color=f"C{number}", label=label, linewidth=1.3)
            axis.grid(alpha=0.3)
            axis.set_xlabel(x_label)
        row[0].set_ylabel(y_label)
    axes[0, 0].legend()
    figure.suptitle("validation episodes")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@torch.no_grad()
def write_films(path: Path, models: Mapping[str, nn.Module], clips: Clips, of_clips: int = 3) -> None:
    """PNG: for clips of different episodes a row of the truth and one of each model's deterministic film, in their order; the first column
    is the last observed frame, the others are spread evenly over the horizon. Borders: green for observed, red for predicted frames."""
    firsts = [int((clips.episodes == episode).nonzero()[0]) for episode in clips.episodes.unique()[:of_clips]]
    strips = []
    for row in firsts:
        clip = clips[row : row + 1]
        video, c = normalise(clip.pixels)[0], clip.context
        columns = spread(COLUMNS - 1, clip.horizon)
        films = [video[c:]] + [predict(model, clip)["reconstructions"][0].float() for model in models.values()]
        cells = torch.stack([torch.cat([video[c - 1 : c], film[columns]]) for film in films])  # [1 + models, columns, 3, H, W]
        cells = enlarge(to_uint8(cells), 96)
        for panels in cells[1:]:
            paint_border(panels, 1, 2)
        strips.append(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, sheet(torch.cat(strips)))
