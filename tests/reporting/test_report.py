"""The report as a user makes it, of a real debug run."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commands import command, process

from aime_fast.errors import ConfigError
from aime_fast.evaluation.collapse import CHECKS
from aime_fast.report import ReportConfig, report
from aime_fast.reporting import charts, tables

VOID = {"meta", "img", "br", "hr", "link", "input"}
SECTIONS = (
    "Collapse",
    "Evaluation",
    "What each pillar is worth",
    "Open-loop prediction",
    "Mixture",
    "Attention",
    "Codebook",
    "Curves",
    "The run",
)


class Page(HTMLParser):
    """Text, data addresses and outside references of a page; every tag must be closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.text, self.inside, self.outside = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "poster", "action"):
                (self.inside if value.startswith("data:") else self.outside).append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A debug run on synthetic data: trained, not evaluated."""
    folder = tmp_path_factory.mktemp("report")
    done = command(
        "train", "--tier", "debug", "--data", "synthetic", "--test-fraction", "0.5", "--steps", "4", "--run-dir", "run", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def read(run: Path, **fields) -> tuple[str, Page]:
    html = report(ReportConfig(str(run), device="cpu", **fields)).read_text(encoding="utf-8")
    return html, Page(html)


def test_report_of_a_run_is_whole_and_self_contained(run):
    html, page = read(run)
    text = " ".join(page.text)
    for section in SECTIONS:
        assert f"<h2>{section}</h2>" in html
    assert [reference for reference in page.outside if not reference.startswith("#")] == []
    assert not re.search(r"https?://|@import|url\((?!#)|<script", html)
    assert html.count("<style") == 1
    assert not re.search("#c0ffe|font-family", html)  # charts take the colours and the font of the page
    kinds = [uri.split(";")[0] for uri in page.inside]
    assert kinds.count("data:image/png") >= 3  # filmstrip, episode of the mixture, attention
    assert kinds.count("data:video/mp4") == 1
    for words in (
        "task gradients",
        "angle by which each gradient is turned",
        "KL z",
        "ELBO",
        "frames per second",
        "slot 3",
        "component 4",
        "head 2",
    ):
        assert words in text, words
    assert f"python -m aime_fast.evaluate {run}" in text  # what makes the missing evaluation
    assert len(html) < 4e6


def test_evaluation_and_targets_are_shown(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    done = command("evaluate", str(copy), "--context", "4", "--horizon", "6", "--clips", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _, page = read(copy)
    text = " ".join(page.text)
    assert "repeat last frame" in text
    assert "step of the prediction" in text
    assert "aime_fast.evaluate" not in text
    assert "attention in reconstruction" in text
    assert "not measured: synthetic data have no positions" in text
    ratio = json.loads((copy / "evaluation/evaluation.json").read_text())["open_loop"]["action_shuffle_ratio"]
    assert f"{ratio:.4g}" in text


def with_rows(run, folder, change):
    """A copy of a run with its logged rows changed, and a last line cut short by a kill."""
    copy = shutil.copytree(run, folder)
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    changed = [row | {name: value for name, value in change.items() if name in row} for row in rows]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed) + '{"step": 9, "loss')
    return copy


def test_a_collapse_is_named_with_its_remedy_and_marked_in_the_curves(run, tmp_path):
    healthy = {"model/slot_overlap": 0.1}  # an untrained model's slots are alike
    html, page = read(with_rows(run, tmp_path / "ill", healthy | {"validation/code_usage": 0.01}))
    text = " ".join(page.text)
    assert CHECKS["dead_codebook"][1] in text
    assert "cosines between task gradients" in text
    assert 'class="mark"' in html
    assert 'class="mark"' not in read(with_rows(run, tmp_path / "healthy", healthy))[0]


def test_pictures_of_training_stand_in_where_the_data_are_gone(run):
    _, page = read(run, data="gone.h5")
    assert "gone.h5" in " ".join(page.text)
    left = {path.name for path in (run / "samples").iterdir() if path.name.startswith("step_00000004")}
    assert left
    assert left <= {text.strip() for text in page.text}


def test_a_run_without_checkpoint_is_reported_without_pictures(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    _, page = read(tmp_path)
    text = " ".join(page.text)
    assert "no checkpoint" in text
    assert "run.json is not there" in text
    assert "predictive" in text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", "data: 5", "data is 5"),
        ("config.yaml", "model: {latent_dim: 0, max_components: 3}", "--latent-dim 0: expected"),
        ("config.yaml", "model: {latent_dim: x}", "--latent-dim x: expected"),
        ("run.json", '{"started": 5}', "started is 5"),
        ("evaluation/evaluation.json", '{"open_loop": [1, 2]}', r"open_loop is \[1, 2\]"),
    ],
)
def test_an_edited_file_of_a_run_is_named_in_one_line(run, tmp_path, name, text, message):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name}: cannot be read .{message}.*move it away") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_settings_of_other_versions_and_missing_values_are_passed_over(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    (tmp_path / "config.yaml").write_text("old: 3\nmodel: {depth: 3, latent_dim: 6, max_components: 4}\ndata: null")
    (tmp_path / "run.json").write_text('{"started": null, "resumed": [3]}')
    read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("nowhere",), "nowhere: no run here, metrics.jsonl is missing"), (("nowhere", "--outt", "x"), "--outt")]
)
def test_a_wrong_run_is_one_line(tmp_path, arguments, message):
    start = process if "--outt" in arguments else command  # a process that ends before its long imports
    done = start("report", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_chart_has_its_points_in_place_and_gaps_for_missing_values():
    line = charts.Line("a", [0, 10, 20, 30, 40], [1.0, 2.0, None, 2.0, 3.0])
    chart = charts.line_chart([line, charts.Line("b", [0, 10], [None, 2.0])], "t")
    (path,) = re.findall(r'<g class="line"><title>a</title><path d="([^"]+)"', chart)
    points = [(command, float(x), float(y)) for command, x, y in re.findall(r"([ML]) (\S+) (\S+)", path)]
    assert [command for command, _, _ in points] == ["M", "L", "M", "L"]
    assert (points[0][1], points[-1][1]) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert points[0][2] > points[-1][2]  # up is more
    assert chart.count("<use") == 1  # the dot of b
    assert charts.line_chart([charts.Line("a", [1], [None])], "t") == ""


def test_a_long_line_is_drawn_as_means_over_a_band_and_outliers_do_not_set_the_limits():
    values = [1e6, *(1.0 + i % 2 for i in range(9999))]
    chart = charts.line_chart([charts.Line("a", range(10000), values)], "t")
    assert "fill-opacity: 0.16" in chart
    assert len(chart) < 40e3
    ticks = [float(tick) for tick in re.findall(r"text-anchor: end[^>]*>([\d.]+)</text>", chart)]
    assert 0.5 < min(ticks) < max(ticks) < 2.5


def test_labels_are_text_in_a_chart():
    label = """"a" < b & it's"""
    chart = charts.line_chart([charts.Line(label, [1, 2], [1.0, 2.0])], "t", marks=[charts.Mark(1, None, label)])
    assert [text.strip() for text in Page(chart).text].count(label) == 3  # titles of line and mark, legend


def test_tables_put_a_model_beside_its_baselines():
    tree = {"clips": 2, "model": {"psnr": [1.0, 2.0]}, "repeat_last_frame": {"psnr": [3.0, 4.0]}, "rank_histogram": [1.0, 2.0]}
    html = tables.render({"open_loop": tree, "a": {"x": 1, "y": None}, "b": {"x": 2.5}})
    assert html.count('class="line"') == 2
    assert html.count('class="chart"') == 2  # PSNR of both, and the histogram
    assert "<th>x</th><th>y</th>" in html  # a and b share a table
    tree |= {"tokens": {"repeat_last_frame": [0.9, 0.8]}, "positions": {"repeat_last_frame": [5.0, 9.0]}}
    assert tables.render({"open_loop": tree}).count('class="chart"') == 4  # shares and pixels are not of one scale


def test_targets_tell_missed_from_not_measured():
    wanted = {"a": (2.0, True), "b": (0.5, False), "c": (None, None)}
    html = tables.targets_table({name: {"value": value, "wanted": 1.0, "met": met} for name, (value, met) in wanted.items()})
    assert re.findall(r'<td class="(\w+)">', html) == ["good", "bad", "unknown"]
