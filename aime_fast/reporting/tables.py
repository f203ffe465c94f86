"""Nested dictionaries as HTML: scalars become tables, lists with one number a step become charts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from aime_fast.reporting.charts import Line, bar_chart, line_chart, number

# Metrics with a scale of their own: each gets its own chart.
OWN_SCALE = ("psnr", "ssim", "lpips")
# Words in the name of a baseline, whose line is dashed.
BASELINES = ("repeat", "mean_frame", "ceiling", "floor", "baseline")


def facts_table(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and scalar values, in as many columns as fit the page; empty if there are none."""
    cells = [(words(name), _cell(value)) for name, value in pairs]
    cells.sort(key=lambda cell: _is_long(cell[1]))
    lines = "".join(f"<div{' class=long' if _is_long(c) else ''}><dt>{escape(name)}</dt><dd>{c}</dd></div>" for name, c in cells)
    return f'<dl class="facts">{lines}</dl>' if lines else ""


def matrix_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each entry of `rows`, one column for each name in any of them; a missing value is a dash."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    head = "".join(f"<th>{escape(words(name))}</th>" for name in columns)
    body = "".join(
        f"<tr><th>{escape(words(name))}</th>{''.join(f'<td>{_cell(row.get(column))}</td>' for column in columns)}</tr>"
        for name, row in rows.items()
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def targets_table(targets: Mapping[str, Mapping[str, Any]]) -> str:
    """Targets `{name: {"value", "wanted", "met"}}` as a table; value and met are None if the target was not measured."""
    verdicts = {True: ("good", "reached"), False: ("bad", "missed"), None: ("unknown", "not measured")}
    lines = "".join(
        f"<tr><th>{escape(words(name))}</th><td>≥ {number(t['wanted'])}</td><td>{number(t['value'])}</td>"
        f'<td class="{verdicts[t["met"]][0]}">{verdicts[t["met"]][1]}</td></tr>'
        for name, t in targets.items()
    )
    head = "<thead><tr><th></th><th>target</th><th>measured</th><th></th></tr></thead>"
    return f"<table>{head}<tbody>{lines}</tbody></table>" if lines else ""


def render(node: Mapping[str, Any], title: str = "", level: int = 3) -> str:
    """Render a nested dictionary: scalars as a table, lists as charts, each inner dictionary under a heading.

    Inner dictionaries with a list of the same name (`{"model": {"psnr": [...]}, "repeat_last_frame": {"psnr": [...]}}`) share a chart
    of it. Inner dictionaries that hold only scalars share a table, if it has at most 8 columns.

    Args:
        title: of the charts of `node` itself.
        level: of the headings, 3 to 6.
    """
    scalars = {name: value for name, value in node.items() if not isinstance(value, (Mapping, list))}
    below = {name: value for name, value in node.items() if isinstance(value, Mapping)}
    parts = [facts_table(scalars.items()), *_charts(title, {name: v for name, v in node.items() if _is_series(v)})]

    shared = _shared_series(below)
    if shared:
        parts += [chart for metric, sources in shared.items() for chart in _charts(f"{title} {metric}", sources)]
        below = {name: {key: v for key, v in value.items() if key not in shared} for name, value in below.items()}
    flat = {name: v for name, v in below.items() if v and not any(isinstance(x, (Mapping, list)) for x in v.values())}
    if len(flat) > 1 and len(set.union(*map(set, flat.values()))) <= 8:
        parts.append(matrix_table(flat))
        below = {name: value for name, value in below.items() if name not in flat}
    for name, value in below.items():
        if value:
            parts.append(f"<h{level}>{escape(words(name))}</h{level}>{render(value, name, min(level + 1, 6))}")
    return "".join(parts)


def words(name: str) -> str:
    """A name of the code as words: "psnr_mean_frame" is "PSNR mean frame"."""
    known = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "ema": "EMA", "kl": "KL", "elbo": "ELBO", "db": "dB"}
    return " ".join(known.get(word, word) for word in name.replace("/", " ").replace("_", " ").split())


def _is_series(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(x is None or isinstance(x, (int, float)) for x in value)


def _shared_series(below: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list]]:
    """{metric: {source: list}} for each metric that at least two of the dictionaries hold as a list.

    A name that is also a key of `below` is a source, not a metric: `repeat_last_frame` in `tokens` and in `positions` are not comparable.
    """
    found: dict[str, dict[str, list]] = {}
    for source, values in below.items():
        for metric, value in values.items():
            if _is_series(value) and metric not in below:
                found.setdefault(metric, {})[source] = value
    return {metric: sources for metric, sources in found.items() if len(sources) > 1}


def _charts(title: str, series: Mapping[str, list]) -> list[str]:
    """Charts of lists with one number a step: histograms as bars; lines of equal length together, except those of OWN_SCALE."""
    if any(name in OWN_SCALE for name in series):
        return [_steps(f"{title} {name}", {name: values}) for name, values in series.items()]
    bars = {name: values for name, values in series.items() if "histogram" in name}
    charts = [
        bar_chart([v or 0 for v in values], words(f"{title} {name}"), "bin", sum(values) / len(values)) for name, values in bars.items()
    ]
    lines = {name: values for name, values in series.items() if name not in bars}
    by_length: dict[int, dict[str, list]] = {}
    for name, values in lines.items():
        by_length.setdefault(len(values), {})[name] = values
    return charts + [_steps(title if len(group) > 1 else f"{title} {next(iter(group))}", group) for group in by_length.values()]


def _steps(title: str, series: Mapping[str, list]) -> str:
    lines = [Line(words(n), range(1, len(v) + 1), v, dashed=any(word in n for word in BASELINES)) for n, v in series.items()]
    return line_chart(lines, words(title.strip()), x_label="step of the prediction")


def _is_long(cell: str) -> bool:
    """Whether a cell is too wide for one of three columns; `facts_table` gives it a whole row, after the others."""
    return len(cell) > 28


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return escape({True: "yes", False: "no", None: "–"}.get(value, str(value)))
    if isinstance(value, list):
        return escape(", ".join(map(str, value)))
    return number(value)
