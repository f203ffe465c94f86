"""Evaluate a run on its held-out episodes: `python -m aime_fast.evaluate RUN_OR_CHECKPOINT [--context 8 --horizon 16 ...]`.

Writes evaluation.json, prediction.png and prediction.mp4, and prints the tables.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from aime_fast.cli import ConfigError, parse_arguments, run_command


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and on how much."""

    run: Positional[str]  # run directory, or one of its checkpoints
    episodes: int | None = None  # held-out episodes; none: all
    clips: int = 8  # open-loop clips cut from each episode
    context: int = 8  # frames shown
    horizon: int = 16  # frames predicted from actions alone
    out: str | None = None  # folder for the results; none: evaluation/ in the run directory
    data: str | None = None  # other data of the same task; none: those of the run
    device: str = "auto"  # cpu, cuda or auto
    compile: Literal["off", "on", "graph", "best"] = "off"  # of imagined frames; pays for long or many roll-outs; bare: best for the device
    ema: bool = True  # the moving average of the weights, or the weights themselves


def evaluate(options: EvaluateConfig) -> dict:
    """Runs the evaluation and writes its files. Returns the content of evaluation.json."""
    from aime_fast.data import make_batches
    from aime_fast.provenance import git_commit, version
    from aime_fast.training import evaluation
    from aime_fast.training.checkpoint import load_model
    from aime_fast.training.settings import choose_compile, choose_device, choose_kernels
    from aime_fast.training.validation import draw_prediction

    device = choose_device(options.device)
    choose_kernels(None)
    model, config, info = load_model(options.run, device, ema=options.ema)
    model.eval()
    model.compile_imagination(choose_compile(options.compile, device))
    data = replace(config.data, data=options.data or config.data.data, replay="auto")  # this may be a smaller GPU
    training, validation = make_batches(data, config.run.seed, device)
    try:
        mean_frame = training.mean_frame()
        episodes = evaluation.held_out_episodes(validation, options.episodes)
        try:
            clips = evaluation.cut_clips(episodes, options.context, options.horizon, options.clips)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        result = {
            "checkpoint": str(info["checkpoint"]),
            "step": info["step"],
            "ema": options.ema,
            "data": options.data or config.data.data,
            "held_out_episodes": len(episodes),
            "device": str(device),
            "torch": version("torch"),
            "commit": git_commit(),
            "reconstruction": evaluation.evaluate_reconstruction(model, validation.one_pass(), mean_frame, config.model.codebook_size),
            "open_loop": evaluation.evaluate_prediction(model, clips),
        }
        out = Path(options.out) if options.out else info["checkpoint"].parent / "evaluation"
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
        draw_clip(model, clips, out / "prediction.png")
        draw_prediction(model, episodes[:4], out / "prediction.mp4", device, options.context, options.horizon)
    finally:
        training.close()
        validation.close()
    print_tables(result)
    print(f"\nwritten to {out}: evaluation.json, prediction.png, prediction.mp4")
    return result


def draw_clip(model, clips, path: Path, columns: int = 8) -> None:
    """A sheet of the first clip's predicted frames: truth | prediction | error | attention overlay, evenly spaced in the horizon."""
    from aime_fast.training.evaluation import Clips, predict
    from aime_fast.training.pictures import save_samples

    first = Clips(clips.video[:1], clips.actions[:1], clips.context)
    out = predict(model, first, first.actions[:, clips.context :])
    horizon = out["reconstructions"].shape[1]
    shown = [round(i * (horizon - 1) / max(min(columns, horizon) - 1, 1)) for i in range(min(columns, horizon))]
    save_samples(path, first.video[0, clips.context :][shown], out["reconstructions"][0, shown], out["attention"][0, shown])


def print_tables(result: dict) -> None:
    """The two tables a person reads."""
    r, o = result["reconstruction"], result["open_loop"]
    print(f"{result['checkpoint']}, step {result['step']}, {result['held_out_episodes']} held-out episodes\n")
    print("reconstruction        PSNR dB    SSIM")
    print(f"  model              {r['psnr']:8.2f}  {r['ssim']:6.3f}")
    print(f"  mean frame         {r['psnr_mean_frame']:8.2f}  {r['ssim_mean_frame']:6.3f}")
    print(f"codes in use {r['code_usage']:.1%} (perplexity {r['code_perplexity']:.1f}), ", end="")
    print(f"effective components {r['effective_components']:.2f} ({r['components_used']} the likeliest somewhere), ", end="")
    print(f"next-token accuracy {r['token_accuracy']:.1%}")
    print(f"\nopen loop, context {o['context']}, {o['clips']} clips")
    print("  step   model PSNR    SSIM   repeat-last-frame PSNR    SSIM")
    ours, repeat = o["model"], o["repeat_last_frame"]
    for i in range(o["horizon"]):
        print(f"  {i + 1:4d}   {ours['psnr'][i]:10.2f}  {ours['ssim'][i]:6.3f}   {repeat['psnr'][i]:22.2f}  {repeat['ssim'][i]:6.3f}")
    ratio = o["action_shuffle_ratio"]
    print(f"action-shuffle ratio {'not defined for one clip' if ratio is None else f'{ratio:.3f}'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the options and evaluate."""
    evaluate(parse_arguments(EvaluateConfig, "python -m aime_fast.evaluate", "Evaluate a trained run.", argv))


def command() -> None:
    """`main` with errors that the user can mend as one line and exit status 2."""
    from aime_fast.training.checkpoint import CheckpointError

    run_command(main, user_errors=(CheckpointError,))


if __name__ == "__main__":
    command()
