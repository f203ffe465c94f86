"""Charts as inline SVG: lines, stacked shares, bars. Colours are CSS variables of the page, so light and dark both read well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, WIDE, HEIGHT = 520, 1060, 230  # of a chart that shares its line with another, and of one that does not
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 10, 36
COLOURS = 8  # --s0 .. --s7 in style.py
POINTS = 300  # a longer line is averaged in so many buckets, with its range behind it


@dataclass(frozen=True)
class Line:
    """One line of a chart. A missing y is None and leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False  # baselines


@dataclass(frozen=True)
class Mark:
    """Something that happened between two places on the x axis."""

    begin: float
    end: float | None  # None: it lasts
    label: str


def number(value: float | int | None) -> str:
    """A number as a person reads it: four digits, thousands apart; None is a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if abs(value) >= 10000 or isinstance(value, int):
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def line_chart(
    lines: Sequence[Line], title: str, x_label: str = "step", log: bool = False, marks: Sequence[Mark] = (), width: int = WIDTH
) -> str:
    """Lines over a common x axis, with the last value of each in the legend.

    Args:
        log: y on a logarithmic scale; values that are not positive are left out.
        marks: shaded behind the lines.
    """
    drawn = [(i, line, _points(line, log)) for i, line in enumerate(lines)]
    drawn = [(i, line, points) for i, line, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, _, points in drawn for x, _ in points]
    frame = Frame(min(xs), max(xs), *_limits([[y for _, y in points] for _, _, points in drawn]), log, width)
    shapes = [frame.axes(x_label)]
    # An <svg> of its own clips what lies outside the limits, without an id that would have to be unique in the page.
    box = f"{width - LEFT - RIGHT}", f"{HEIGHT - TOP - BOTTOM}"
    shapes.append(f'<svg x="{LEFT}" y="{TOP}" width="{box[0]}" height="{box[1]}" viewBox="{LEFT} {TOP} {box[0]} {box[1]}">')
    for mark in marks:
        right = frame.x(frame.x1 if mark.end is None else mark.end)
        left = min(frame.x(mark.begin), right - 3)  # one that has just begun is seen too
        shapes.append(
            f'<rect class="mark" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{box[1]}">'
            f"<title>{escape(mark.label)}</title></rect>"
        )
    for i, line, points in reversed(drawn):  # the first line lies on top
        shapes.append(_line(frame, points, i, line))
    shapes.append("</svg>")
    legend = "".join(
        f'<span class="key s{i % COLOURS}{" dashed" if line.dashed else ""}">{escape(line.label)} <b>{number(_last(line))}</b></span>'
        for i, line, _ in drawn
    )
    return _figure(title, shapes, legend, width)


def stacked_chart(shares: Sequence[Sequence[float]], title: str, x_label: str, labels: Sequence[str], width: int = WIDTH) -> str:
    """Shares that add up to 1 at each x = 0, 1, ..., as areas on top of each other: shares [T][K]."""
    frame = Frame(0, max(len(shares) - 1, 1), 0.0, 1.0, width=width)
    below, shapes = [0.0] * len(shares), [frame.axes(x_label)]
    for k, label in enumerate(labels):
        above = [b + row[k] for b, row in zip(below, shares)]
        outline = [(t, y) for t, y in enumerate(above)] + [(t, y) for t, y in reversed(list(enumerate(below)))]
        path = " ".join(f"{frame.x(t):.1f},{frame.y(y):.1f}" for t, y in outline)
        again = " again" if k >= COLOURS else ""
        shapes.append(f'<polygon class="area s{k % COLOURS}{again}" points="{path}"><title>{escape(label)}</title></polygon>')
        below = above
    means = [sum(row[k] for row in shares) / len(shares) for k in range(len(labels))]
    legend = "".join(
        f'<span class="key block s{k % COLOURS}{" again" if k >= COLOURS else ""}">{escape(label)} <b>{mean:.0%}</b></span>'
        for k, (label, mean) in enumerate(zip(labels, means))
    )
    return _figure(title, shapes, legend, width)


def bar_chart(values: Sequence[float], title: str, x_label: str, even: float | None = None) -> str:
    """Bars numbered from 1; `even` draws the height they would have if all were alike."""
    frame = Frame(0.5, len(values) + 0.5, 0.0, max(*values, even or 0.0, 1e-12) * 1.08)
    wide = frame.x(2) - frame.x(1)
    shapes = [frame.axes(x_label)]
    for i, value in enumerate(values, 1):
        top = frame.y(value)
        shapes.append(
            f'<rect class="bar" x="{frame.x(i) - 0.4 * wide:.1f}" y="{top:.1f}" width="{0.8 * wide:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{number(value)}</title></rect>'
        )
    if even is not None:
        shapes.append(f'<line class="even" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{frame.y(even):.1f}" y2="{frame.y(even):.1f}"/>')
    return _figure(title, shapes, "", WIDTH)


class Frame:
    """The rectangle of a chart: from values to its coordinates."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float, log: bool = False, width: int = WIDTH):
        self.x0, self.x1 = (x0, x1) if x1 > x0 else (x0 - 0.5, x0 + 0.5)
        self.y0, self.y1, self.log, self.width = y0, y1, log, width

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def axes(self, x_label: str) -> str:
        """Grid, tick labels and the name of the x axis."""
        shapes = []
        for value, label in _powers(self.y0, self.y1) if self.log else _ticks(self.y0, self.y1):
            y = self.y(value)
            shapes.append(f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            shapes.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{label}</text>')
        for value, label in _ticks(self.x0, self.x1):
            if value == int(value):  # steps, frames, ranks: there is nothing between two of them
                shapes.append(f'<text class="tick middle" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}">{label}</text>')
        shapes.append(f'<text class="tick end name" x="{self.width - RIGHT}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
        return "".join(shapes)


def _points(line: Line, log: bool) -> list[tuple[float, float]]:
    pairs = [(x, y) for x, y in zip(line.x, line.y) if y is not None and math.isfinite(y)]
    return [(x, math.log10(y)) for x, y in pairs if y > 0] if log else pairs


def _last(line: Line) -> float | None:
    return next((y for y in reversed(line.y) if y is not None), None)


def _limits(columns: list[list[float]]) -> tuple[float, float]:
    """Room for all lines but the rare outlier: the first steps of training would flatten everything after them."""
    low, high = [], []
    for values in columns:
        ordered = sorted(values)
        cut = len(ordered) // 50
        low.append(ordered[cut])
        high.append(ordered[-1 - cut])
    y0, y1 = min(low), max(high)
    margin = 0.06 * (y1 - y0) or 0.06 * abs(y1) or 0.5
    return y0 - margin, y1 + margin


def _line(frame: Frame, points: list[tuple[float, float]], index: int, line: Line) -> str:
    style = f"s{index % COLOURS}{' dashed' if line.dashed else ''}"
    title = f"<title>{escape(line.label)}</title>"
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="dot {style}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">{title}</circle>'
    size, band = -(-len(points) // POINTS), ""
    if size > 1:
        buckets = [points[i : i + size] for i in range(0, len(points), size)]
        middle = [sum(x for x, _ in b) / len(b) for b in buckets]
        edges = [(x, max(y for _, y in b)) for x, b in zip(middle, buckets)]
        edges += [(x, min(y for _, y in b)) for x, b in reversed(list(zip(middle, buckets)))]
        band = f'<polygon class="band {style}" points="{_path(frame, edges)}"/>'
        points = [(x, sum(y for _, y in b) / len(b)) for x, b in zip(middle, buckets)]
    return f'{band}<polyline class="line {style}" points="{_path(frame, points)}">{title}</polyline>'


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _ticks(low: float, high: float, count: int = 6) -> list[tuple[float, str]]:
    """Round numbers between two values, about `count` of them, written with as many decimals as tell them apart."""
    rough = (high - low) / count
    power = math.floor(math.log10(rough))
    step = next(m * 10.0**power for m in (1, 2, 5, 10) if m * 10.0**power >= rough * 0.999)
    decimals = max(0, -math.floor(math.log10(step * 1.001)))
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(v, number(v) if decimals > 5 or abs(v) >= 10000 else f"{v:.{decimals}f}".replace("-", "−")) for v in values]


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between two logarithms; where there are few, twice and five times those too."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    values = [(math.log10(factor) + p, factor * 10.0**p) for p in powers for factor in factors]
    return [(v, number(value)) for v, value in values if low <= v <= high]


def _figure(title: str, shapes: Sequence[str], legend: str, width: int) -> str:
    picture = f'<svg class="chart" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(shapes)}</svg>'
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{picture}<div class="legend">{legend}</div></figure>'
