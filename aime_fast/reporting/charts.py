"""Charts as inline SVG, drawn by matplotlib: lines, stacked shares and bars. Their colours follow the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # matplotlib is imported where it is used
    from matplotlib.axes import Axes

WIDTH, WIDE, HEIGHT = 520, 1060, 230  # half the page, the whole page; SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 14, 38  # margins around the axes
SERIES = 8  # colours of lines and components; more start again at the first
# matplotlib has no CSS variables. It draws in these colours; `_figure` replaces each by the variable of style.py.
COLOURS = {name: f"#c0ffe{i:x}" for i, name in enumerate([*(f"s{i}" for i in range(SERIES)), "soft", "rule", "bad"])}
POINTS = 300  # a longer line is drawn as the means of so many buckets, over a band from their least to their largest values
OUTLIERS = 0.02  # share of a line's values that may lie above the y axis, and below it


@dataclass(frozen=True)
class Line:
    """One line of a chart; x and y have equal lengths. None in y leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False  # for baselines


@dataclass(frozen=True)
class Mark:
    """A shaded interval of the x axis; its label shows under the pointer."""

    begin: float
    end: float | None  # None: the end of the axis
    label: str


def number(value: float | int | None) -> str:
    """Format a number with four significant digits and thousands apart; None, NaN and infinities are a dash."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 10000 or isinstance(value, int) else f"{value:.4g}"
    return text.replace("-", "−")


def line_chart(
    lines: Sequence[Line], title: str, x_label: str = "step", log: bool = False, marks: Sequence[Mark] = (), width: int = WIDTH
) -> str:
    """Draw lines over a common x axis, with the last value of each in the legend.

    Args:
        log: logarithmic y axis; values that are not positive become gaps.
        marks: intervals shaded behind the lines.

    Returns:
        HTML, empty where no line has a value.
    """
    from matplotlib.ticker import LogLocator

    drawn = [(line, x, y) for line in lines for x, y in [_buckets(line, log)] if y.count()]
    if not drawn:
        return ""
    axes, legend = _axes(x_label, width), []
    if log:
        axes.set_yscale("log", nonpositive="mask")
    for i, (line, x, y) in enumerate(drawn):
        style = {"color": COLOURS[f"s{i % SERIES}"], "zorder": 3 - i / len(drawn)}  # the first line lies on top
        middle, mean = x.mean(axis=1), np.ma.exp(np.ma.log(y).mean(axis=1)) if log else y.mean(axis=1)
        if y.shape[1] > 1:
            axes.fill_between(middle, y.min(axis=1), y.max(axis=1), alpha=0.16, linewidth=0, **style)
        gap = np.pad(np.ma.getmaskarray(mean), 1, constant_values=True)
        alone = ~gap[1:-1] & gap[:-2] & gap[2:]  # a value between two gaps is a dot
        style |= {"linestyle": (0, (3, 2.5)) if line.dashed else "-", "marker": "o", "markevery": alone, "markeredgewidth": 0}
        axes.plot(middle, mean, linewidth=1.6, gid=f"line:{line.label}", **style)
        last = next(value for value in reversed(line.y) if value is not None)
        legend.append(_key(line.label, number(last), i, "dashed" if line.dashed else ""))
    # Outliers, such as the first losses of a run, must not flatten the rest of the curves.
    low = min(np.quantile(y.compressed(), OUTLIERS, method="lower") for _, _, y in drawn)
    high = max(np.quantile(y.compressed(), 1 - OUTLIERS, method="higher") for _, _, y in drawn)
    axes.dataLim.intervaly = low, high
    left, right = min(x.min() for _, x, _ in drawn), max(x.max() for _, x, _ in drawn)
    if left == right:
        left, right = left - 0.5, right + 0.5
    if log:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    for mark in marks:
        style = {"color": COLOURS["bad"], "alpha": 0.13, "linewidth": 4, "zorder": 0}  # the outline shows a mark without length
        axes.axvspan(min(mark.begin, right), right if mark.end is None else mark.end, gid=f"mark:{mark.label}", **style)
    axes.set_xlim(left, right)
    return _figure(axes, title, legend)


def stacked_chart(shares: Sequence[Sequence[float]], title: str, x_label: str, labels: Sequence[str], width: int = WIDTH) -> str:
    """Draw shares [T, K] that sum to 1 over K as stacked areas at x = 0 .. T-1, with their means in the legend."""
    axes, legend = _axes(x_label, width), []
    axes.set_ylim(0, 1)
    columns = np.transpose(shares)  # [K, T]
    for k, (area, label, share) in enumerate(zip(axes.stackplot(range(len(shares)), columns), labels, columns)):
        area.set(color=COLOURS[f"s{k % SERIES}"], alpha=0.85 if k < SERIES else 0.45, linewidth=0, gid=f"area:{label}")
        legend.append(_key(label, f"{share.mean():.0%}", k, "block" if k < SERIES else "block again"))
    return _figure(axes, title, legend)


def bar_chart(values: Sequence[float], title: str, x_label: str, even: float | None = None) -> str:
    """Draw bars numbered from 1. `even`: where to draw a dashed line, the height of bars that are all equal."""
    axes = _axes(x_label, WIDTH)
    for bar, value in zip(axes.bar(range(1, len(values) + 1), values, color=COLOURS["s0"]), values):
        bar.set_gid(f"bar:{number(value)}")
    if even is not None:
        axes.axhline(even, color=COLOURS["soft"], linewidth=1, linestyle=(0, (4, 4)))
    return _figure(axes, title, [])


def _axes(x_label: str, width: int) -> Axes:
    """Axes without a frame: horizontal grid lines, at most 7 ticks, integers on x."""
    from matplotlib.figure import Figure

    figure = Figure((width / 72, HEIGHT / 72), frameon=False)  # an inch is 72 SVG units
    box = LEFT / width, BOTTOM / HEIGHT, 1 - (LEFT + RIGHT) / width, 1 - (TOP + BOTTOM) / HEIGHT
    axes = figure.add_axes(box, frameon=False, axisbelow=True)
    axes.margins(x=0, y=0.06)
    axes.grid(axis="y", color=COLOURS["rule"], linewidth=1)
    axes.tick_params(left=False, bottom=False, pad=6, labelcolor=COLOURS["soft"])
    axes.set_xlabel(x_label, loc="right", color=COLOURS["soft"])
    axes.locator_params(nbins=6, steps=(1, 2, 5, 10))
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.ticklabel_format(axis="y", scilimits=(-4, 6))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    return axes


def _buckets(line: Line, log: bool) -> tuple[np.ma.MaskedArray, np.ma.MaskedArray]:
    """x and y of a line, [N, size] with N <= POINTS: each row is a bucket of neighbours. What cannot be drawn is masked."""
    size = max(1, -(-len(line.y) // POINTS))
    padding = [None] * (-len(line.y) % size)
    x, y = np.array([[*line.x, *padding], [*line.y, *padding]], dtype=float).reshape(2, -1, size)
    y = np.ma.masked_less_equal(np.ma.masked_invalid(y), 0 if log else -np.inf)
    return np.ma.masked_where(np.ma.getmaskarray(y), x), y


def _key(label: str, value: str, index: int, kind: str) -> str:
    """An entry of the legend."""
    return f'<span class="key {kind}" style="--c: var(--s{index % SERIES})">{escape(label)} <b>{value}</b></span>'


def _figure(axes: Axes, title: str, legend: Sequence[str]) -> str:
    """The card of a chart: title, SVG, legend. An artist of gid "class:label" becomes a group with that class and a title."""
    import matplotlib

    file, width = io.StringIO(), round(axes.figure.get_figwidth() * 72)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):  # text stays text; ids differ between charts
        axes.figure.savefig(file, format="svg")
    svg = file.getvalue()
    svg = svg[svg.index('<g id="figure_1">') :]  # drops the metadata, and a style sheet that would apply to the whole page
    svg = re.sub(r"<g id=.(\w+):([^>]*).>", r'<g class="\1"><title>\2</title>', svg)
    # Drops group ids, which repeat from chart to chart, fonts, which the page sets, decimals after the second, and line breaks.
    svg = re.sub(r'(?<=<g) id="[^"]*"| transform="rotate\(-0 [^"]*"|font-family: [^;]*; |(?<=\.\d\d)\d+(?=[\s"])|\s*\n\s*(?=<)', "", svg)
    for name, placeholder in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    head = f'<svg class="chart" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{head}{svg}<div class="legend">{"".join(legend)}</div></figure>'
