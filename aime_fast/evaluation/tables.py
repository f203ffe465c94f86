"""The result of an evaluation as tables for the terminal."""

from __future__ import annotations

PRINTED_STEPS = (1, 2, 3, 5, 8, 10, 16, 25, 35, 50)  # rows of the printed tables; the file has every step
# Names in the tables of what predicted the frames.
SOURCES = {
    "model": "model",
    "sample_mean": "mean of samples",
    "sample_best": "best sample",
    "mean_picture": "mean picture",
    "token_model": "token model",
    "repeat_last_frame": "repeat-last-frame",
    "mean_frame": "mean frame",
    "tokenizer": "tokenizer",
}


def print_tables(result: dict) -> None:
    """Print the result of `aime_fast.evaluate` as tables."""
    r, o, c = result["reconstruction"], result["open_loop"], result["calibration"]
    print(f"{result['checkpoint']}, step {result['step']}, {result['episodes']} {result['part']} episodes, {result['seconds']:.0f} s\n")
    print("reconstruction        PSNR dB    SSIM")
    print(f"  model              {r['psnr']:8.2f}  {r['ssim']:6.3f}")
    print(f"  mean frame         {r['psnr_mean_frame']:8.2f}  {r['ssim_mean_frame']:6.3f}")
    print(f"codes in use {r['code_usage']:.1%} (perplexity {r['code_perplexity']:.1f}), ", end="")
    print(f"effective components {r['effective_components']:.2f} ({r['components_used']} the likeliest somewhere), ", end="")
    print(f"next-token accuracy {r['token_accuracy']:.1%}")
    print(f"\ncalibration of the prior: log p(z) minus that of its own samples {c['log_prob_difference']:+.2f} nats, shares of the ranks")
    print(f"  {' '.join(f'{share:.2f}' for share in c['rank_histogram'])}  (0.10 each where calibrated)")
    print(f"\nopen loop, context {o['context']}, {o['clips']} clips")
    sources = [name for name in SOURCES if name in o]
    steps = [step for step in PRINTED_STEPS if step < o["horizon"]] + [o["horizon"]]
    for kind, digits in (("psnr", 2), ("ssim", 3), ("lpips", 3)):
        if kind in o["model"]:
            _print_curves(kind, {SOURCES[name]: o[name][kind] for name in sources}, steps, digits)
    _print_curves("token accuracy", {_label(name): curve for name, curve in o["tokens"].items()}, steps, 3)
    if isinstance(o["positions"], dict):
        curves = {_label(name): curve for name, curve in o["positions"].items() if isinstance(curve, list)}
        _print_curves("position error, pixels", curves, steps, 2)
        for name, table in o["positions"].items():
            if name.startswith("by_point"):
                _print_table(f"position error, pixels, {_label(name)}", {_label(film): row for film, row in table.items()}, 2)
        for span, table in o["explained_near"].items():
            _print_table(f"share explained near, {_label(span)}", {_label(film): row for film, row in table.items()}, 3)
        _print_table("share explained near, reconstruction", {"model": r["explained_near"]}, 3)
    if "sampled_minus_deterministic" in o:
        gap = o["sampled_minus_deterministic"]["at_step_5"]
        print(f"\nsampled minus deterministic at step 5 {_decibels(gap)}")
        gain = o["mean_picture_psnr_gain_on_better_baseline"]
        print(f"mean picture of samples, gain on the better baseline: {_decibels(gain['steps_5_to_16'])} over steps 5 to 16, ", end="")
        print(f"{_decibels(gain['smallest'])} at least")
    _print_outcomes(result["outcomes"], steps)
    if "probes" in result:
        _print_probes(result["probes"])
    for name in ("lpips", "positions"):
        if isinstance(o.get(name), str):
            print(f"{name} {o[name]}")
    print("\ntargets                                value   wanted")
    for name, target in o["targets"].items():
        value = "    none" if target["value"] is None else f"{target['value']:8.3f}"
        verdict = {None: "not measured", True: "met", False: "missed"}[target["met"]]
        print(f"  {name:35s} {value}  >= {target['wanted']:5.2f}  {verdict}")


def _print_outcomes(outcomes: dict, steps: list[int]) -> None:
    """How well rewards are predicted."""
    if not outcomes["clips"]:
        return
    curves = {_label(name): curve for name, curve in outcomes["squared_error"].items()}
    _print_curves("squared error of predicted rewards", curves, steps, 3)
    correlations = ", ".join(f"{'-' if c is None else f'{c:.2f}'} over {name}" for name, c in outcomes["return_correlation"].items())
    print(f"ahead of both baselines to step {outcomes['ahead_to']}; correlation of imagined and true returns {correlations}")


def _print_probes(probes: dict) -> None:
    """What each pillar is worth, and what is read out of latents."""
    _print_table("what each pillar is worth", {_label(name): row for name, row in probes["pillars"].items()}, 4)
    if isinstance(probes["latents"], dict):
        _print_table("R^2 of what is read out of latents", {_label(name): row for name, row in probes["latents"].items()}, 3)
    else:
        print(f"latents {probes['latents']}")


def _print_table(title: str, rows: dict[str, dict[str, float | str | None]], digits: int) -> None:
    """A table with one row for each entry, one column for each name in the first; a dash where nothing could be measured."""
    columns = list(next(iter(rows.values()), {}))
    first, width = max(map(len, rows), default=0) + 2, max(map(len, [*columns, "-" * 9])) + 2
    print(f"\n{title}\n  {'':{first}s}" + "".join(f"{column:>{width}s}" for column in columns))
    for name, row in rows.items():
        values = (row[column] for column in columns)
        cells = ("-" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}" for value in values)
        print(f"  {name:{first}s}" + "".join(f"{cell:>{width}s}" for cell in cells))


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f} dB"


def _label(name: str) -> str:
    """A key of the file as the tables call it."""
    return SOURCES.get(name, name.replace("_", " "))


def _print_curves(title: str, curves: dict[str, list[float | None]], steps: list[int], digits: int) -> None:
    """A table with one row for each of `steps`, one column for each curve; a dash where nothing could be measured."""
    width = max(map(len, curves)) + 2
    print(f"\n{title}\n  step" + "".join(f"{name:>{width}s}" for name in curves))
    for step in steps:
        values = (curve[step - 1] for curve in curves.values())
        print(f"  {step:4d}" + "".join(f"{'-':>{width}s}" if value is None else f"{value:{width}.{digits}f}" for value in values))
