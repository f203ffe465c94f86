"""The page of a report: collapse checks, evaluation, pictures and curves of one run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from aime_fast.evaluation.clips import infer_episode
from aime_fast.evaluation.collapse import CHECKS, Finding, Watch, replay
from aime_fast.reporting import imagery
from aime_fast.reporting.charts import Line, Mark, line_chart, number
from aime_fast.reporting.records import Record
from aime_fast.reporting.style import STYLE
from aime_fast.reporting.tables import facts_table, matrix_table, render, targets_table, words
from aime_fast.runtime.files import write_text

EPISODES = 3  # held-out episodes to draw
FRAMES = 200  # of each, given to the model as one sequence


@dataclass(frozen=True)
class Model:
    """A trained model and the held-out episodes to draw with it."""

    model: object  # DPGMMVariationalRecurrentAutoencoder in eval mode
    episodes: Sequence  # TensorDicts as from SequenceBatches.episode
    codebook_size: int


def write_report(record: Record, model: Model | str, out: Path) -> Path:
    """Write the report of a run as one HTML file without outside references.

    Args:
        record: the files of the run.
        model: draws the pictures; a string says why there is no model, and the page shows it instead.
        out: the file to write.

    Returns:
        `out`.
    """
    watch = _watch(record)
    findings = replay(watch, record.rows) if watch else []
    pictures = _pictures(record, model)
    sections = {
        "Collapse": _collapse(watch, findings),
        **({"Control": _control(record)} if record.names("play/") else {}),
        "Evaluation": _evaluation(record),
        "What each pillar is worth": _pillars(record),
        "Open-loop prediction": pictures["open_loop"] + _video(record),
        "Mixture": pictures["mixture"],
        "Attention": pictures["attention"],
        "Codebook": pictures["codebook"],
        "Curves": _curves(record, _marks(findings)),
        "The run": _run(record),
    }
    title = _title(record)
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in sections)
    body = "".join(f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{content}</section>' for name, content in sections.items())
    write_text(
        out,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><header><h1>{escape(title)}</h1>"
        f'<p class="soft">{escape(_subtitle(record))}</p><nav>{links}</nav></header><main>{body}</main></body></html>\n',
    )
    return out


def _title(record: Record) -> str:
    data = record.config.get("data", {})
    return f"{data.get('domain', record.folder.name)} {data.get('task', '')}, tier {record.config.get('tier', '?')}"


def _subtitle(record: Record) -> str:
    facts, last = record.facts, record.rows[-1] if record.rows else {}
    size = record.config.get("data", {}).get("image_size")
    seconds = last.get("time", 0.0)
    took = f"{seconds:.1f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    parts = [
        f"{size}×{size} pixels" if size else None,
        f"{facts['parameters'] / 1e6:.1f} M parameters" if "parameters" in facts else None,
        f"{number(last['step'])} updates in {took}" if last else None,
        f"seed {facts['seed']}" if "seed" in facts else None,
        f"on {facts['device']}" if "device" in facts else None,
        facts.get("started", "")[:10],
    ]
    return " · ".join(part for part in parts if part)


def _watch(record: Record) -> Watch | None:
    model = record.config.get("model", {})
    if "latent_dim" not in model or "max_components" not in model:
        return None
    return Watch(model["latent_dim"], model["max_components"])


def _collapse(watch: Watch | None, findings: list[Finding]) -> str:
    """The state of each check at the end of the run, and every begin and end of a collapse."""
    if watch is None:
        return _missing("the checks need the run's config.yaml, which is missing")
    lines = []
    for name in CHECKS:
        reading, active = watch.readings.get(name), watch.flags().get(f"collapse/{name}")
        state = ("unknown", "not measured") if reading is None else ("bad", "collapsed") if active else ("good", "quiet")
        note = reading.words if reading else "its scalars were not logged, or the check does not apply yet"
        lines.append(f'<tr><th>{words(name)}</th><td class="{state[0]}">{state[1]}</td><td>{escape(note)}</td></tr>')
    history = "".join(
        f'<div class="finding{"" if f.begins else " over"}"><b>Step {f.step}: {words(f.name)} {"begins" if f.begins else "is over"}.</b> '
        f"{escape(f.words)}.{f' <br>Remedy: {escape(f.remedy)}.' if f.begins else ''}</div>"
        for f in findings
    )
    return f"<table><tbody>{''.join(lines)}</tbody></table>{history}"


def _marks(findings: list[Finding]) -> list[Mark]:
    """One mark for each collapse, from its begin to its end."""
    marks: list[Mark] = []
    for i, finding in enumerate(findings):
        if finding.begins:
            end = next((f.step for f in findings[i:] if f.name == finding.name and not f.begins), None)
            marks.append(Mark(finding.step, end, f"{words(finding.name)}: {finding.words}. Remedy: {finding.remedy}"))
    return marks


def _evaluation(record: Record) -> str:
    """Everything in evaluation.json, with a note where the run has gone on since."""
    command = f"python -m aime_fast.evaluate {shlex.quote(str(record.folder))}"
    if not record.evaluation:
        return _missing("no evaluation yet; make it with", command)
    step = record.rows[-1]["step"] if record.rows else 0
    phase = [row["latent_phase/update"] for row in record.rows if row["step"] == step and "latent_phase/update" in row]
    measured = record.evaluation.get("step", 0), record.evaluation.get("latent_phase_updates", record.evaluation.get("dynamics_updates", 0))
    old = ""
    if measured < (reached := (step, (phase or [0])[-1])):
        why = "measured at step {} and {} updates of the latent phase; the run is now at {} and {}; renew it with"
        old = _missing(why.format(*measured, *reached), command)
    loop = dict(record.evaluation.get("open_loop", {}))
    targets = loop.pop("targets", {})
    shown = {name: value for name, value in record.evaluation.items() if name != "probes"} | {"open_loop": loop}
    return f'{old}{targets_table(targets)}<div class="charts">{render(shown)}</div>'


def _control(record: Record) -> str:
    """Returns and what actor and critic have learnt, of an online run, over simulator steps."""

    def chart(title: str, *names: str) -> str:
        lines = [Line(words(name.rsplit("/", 1)[-1]), *record.series(name, "environment_frames")) for name in names]
        return line_chart(lines, title, x_label="environment frames")

    charts = (
        chart("return of the episodes of a cycle, played with noise", "play/return", "play/least_return"),
        chart("returns in imagination", "behaviour/imagined_return", "behaviour/value_size"),
        chart("entropy of the actor, nats", "behaviour/entropy"),
        chart("share of held-out rewards' variance explained", "validation/reward_explained"),
        chart("largest mean of an action", "behaviour/action_bias"),
        chart("frames a second", "play/environment_frames_per_second", "perceive/frames_per_second"),
    )
    played, command = record.returns, f"python -m aime_fast.evaluate {shlex.quote(str(record.folder))} --returns"
    if not played:
        return f'{_missing("no episodes without noise yet; play them with", command)}<div class="charts">{"".join(charts)}</div>'
    facts = {name: played[name] for name in ("mean", "standard_error", "minimum", "episodes", "environment_frames") if name in played}
    pictures = imagery.inline_picture(record.folder / "evaluation" / "returns.png") if _has(record, "returns.png") else ""
    video = imagery.inline_video(record.folder / "evaluation" / "returns.mp4") if _has(record, "returns.mp4") else ""
    return f'<h3>Episodes without noise</h3>{facts_table(facts.items())}{pictures}{video or ""}<div class="charts">{"".join(charts)}</div>'


def _has(record: Record, name: str) -> bool:
    return (record.folder / "evaluation" / name).is_file()


def _pillars(record: Record) -> str:
    """The probes of evaluation.json: what it costs to replace what a pillar gives, and what is read out of latents."""
    probes = record.evaluation.get("probes", {})
    if not probes:
        return _missing("no probes yet; make them with", f"python -m aime_fast.evaluate {shlex.quote(str(record.folder))}")
    latents = probes.get("latents", {})
    readout = f"<p>Latents {escape(latents)}</p>" if isinstance(latents, str) else matrix_table(latents)
    return (
        "<p>The trained model with what one pillar gives replaced: the map by a uniform one, context and actions by those of another "
        "sequence, the mixture by its likeliest component. A cost above 0 says that the pillar helps.</p>"
        f"{matrix_table(probes.get('pillars', {}))}<h3>R² of what is read out of latents</h3>{readout}"
    )


def _pictures(record: Record, model: Model | str) -> dict[str, str]:
    """HTML of each section drawn with the model. Without a model: the reason, and the last pictures saved in training."""
    if isinstance(model, str):
        missing = dict.fromkeys(("open_loop", "mixture", "attention", "codebook"), _missing(f"no picture without the model: {model}"))
        return missing | {"open_loop": missing["open_loop"] + "".join(map(imagery.inline_picture, record.samples()))}
    inferred = [infer_episode(model.model, episode, FRAMES) for episode in model.episodes]
    return {
        "open_loop": imagery.open_loop(model.model, model.episodes),
        "mixture": imagery.mixture(inferred[0]),
        "attention": imagery.attention(inferred[0]),
        "codebook": imagery.codebook(inferred, model.codebook_size),
    }


def _video(record: Record) -> str:
    if record.video is None:
        return _missing("no prediction video yet; make it with", f"python -m aime_fast.evaluate {shlex.quote(str(record.folder))}")
    return imagery.inline_video(record.video) or _missing("the prediction video is too large for this page; it is", str(record.video))


def _curves(record: Record, marks: list[Mark]) -> str:
    """The scalars of metrics.jsonl by kind; empty charts and kinds are left out."""

    def chart(title: str, names: Sequence[str], log: bool = False, label: Callable[[str], str] = words) -> str:
        return line_chart([Line(label(n), *record.series(n)) for n in names], title, log=log, marks=marks)

    def last(name: str) -> str:
        return words(name.rsplit("/", 1)[-1].removeprefix("angle_").removeprefix("cosine_"))

    losses = record.names("loss/")
    held_out = {name.removeprefix("validation/"): name for name in record.names("validation/")}
    compared = {kind: [n for key, n in held_out.items() if key.startswith(kind)] for kind in ("psnr", "ssim")}
    groups = {
        "Task gradients": [
            chart("norms of the task gradients", record.names("gradient_norm/"), log=True, label=last),
            chart("cosines between task gradients", record.names("rgb/cosine_"), label=last),
            chart("RGB: angle by which each gradient is turned, radians", record.names("rgb/angle_"), label=last),
        ],
        "Losses": [
            line_chart(
                [Line("training", *record.series(n)), *([Line("held out", *record.series(held_out[n]))] if n in held_out else [])],
                last(n),
                marks=marks,
            )
            for n in losses
        ],
        "Held-out episodes": [
            *(chart(f"{words(kind)} of reconstructions", pair, label=last) for kind, pair in compared.items()),
            *(chart(last(n), [n], label=last) for key, n in held_out.items() if key not in losses and key.split("_")[0] not in compared),
        ],
        "Latent phase, held-out episodes, over its own updates": [
            line_chart([Line(last(n), *record.series(n, "latent_phase/update"))], last(n), x_label="update")
            for n in record.names("latent_phase/")
            if n != "latent_phase/update"
        ],
        "Model and speed": [
            *(chart(last(n), [n], label=last) for n in record.names("model/")),
            *(chart(words(n), [n]) for n in ("frames_per_second", "learning_rate", "beta", "skipped_updates")),
        ],
    }
    return "".join(
        f'<h3>{name}</h3><div class="charts">{"".join(charts)}</div>' if any(charts) else "" for name, charts in groups.items()
    ) or _missing("metrics.jsonl has no row yet; the run logs every --log-every updates")


def _run(record: Record) -> str:
    facts = {name: value for name, value in record.facts.items() if not isinstance(value, (dict, list))}
    parts = [facts_table(facts.items())]
    if versions := record.facts.get("versions"):
        parts.append(f"<h3>Versions</h3>{facts_table(versions.items())}")
    if resumed := record.facts.get("resumed"):
        starts = [
            (f"resumed {i}", f"from step {start.get('from_step')}, {start.get('started')}: {start.get('command')}")
            for i, start in enumerate(resumed, 1)
            if isinstance(start, dict)
        ]
        parts.append(facts_table(starts))
    return "".join(parts) or _missing("run.json is not there")


def _missing(why: str, command: str = "") -> str:
    return f'<p class="missing">{escape(why)}{f" <code>{escape(command)}</code>" if command else ""}</p>'


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
