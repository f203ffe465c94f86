"""`profiling.bench pillars`: every variant trains, and is what it says."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from aime_fast.config import preset
from aime_fast.training import DMCVBTrainer, latent_phase
from profiling import bench
from profiling.bench_pillars import table
from profiling.pillars import MOST, VARIANTS

FIRST = 2  # picture steps


def trained(variant: str, run_dir) -> tuple[DMCVBTrainer, dict]:
    """A debug run with two joint updates, and the averages' outputs on a batch of noise."""
    config = preset("debug")
    data = dataclasses.replace(config.data, data="synthetic", episodes=4, augment=False)
    optim = dataclasses.replace(
        config.optim, picture_steps=FIRST, adversarial_start_epochs=0.0, latent_phase_updates=2, latent_phase_frames=3
    )
    run = dataclasses.replace(config.run, steps=FIRST + 2, run_dir=str(run_dir), device="cpu", validate_every=0, sample_every=0)
    trainer = DMCVBTrainer(dataclasses.replace(config, data=data, optim=optim, run=run))
    VARIANTS[variant][1](trainer)
    trainer.train()
    torch.manual_seed(0)
    video = torch.rand(2, 5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        return trainer, trainer.ema.forward_sequence(video, torch.rand(2, 5, trainer.batches.action_dim))


def weighs_pixels_less_and_less(trainer: DMCVBTrainer) -> bool:
    likelihood, background = trainer.model.decoder.likelihood, trainer.model.encoder.background
    frames = torch.stack([background, background + 1.0])
    found = []
    for schedule, step in ((trainer.schedules.picture, 0), (trainer.schedules.picture, FIRST // 2), (trainer.schedules.joint, 0)):
        schedule(step)
        error = likelihood.nll(frames + 0.1, frames) - type(likelihood).nll(likelihood, frames, frames)
        found.append((error / error[0]).tolist())
    return found == [pytest.approx([1, MOST]), pytest.approx([1, (1 + MOST) / 2]), pytest.approx([1, 1])]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("whole", "upgrad", "pcgrad")])
def test_a_variant_trains_and_is_what_it_says(variant, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_phase, "falling", latent_phase.falling)
    trainer, out = trained(variant, tmp_path)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in logged if "loss/elbo" in row][-1]
    assert all(value == value for value in last.values() if isinstance(value, float))
    is_so = {
        "attention": (out["attention"] - 1 / out["attention"][0, 0].numel()).abs().max() < 1e-6,
        "context": not out["context"].any(),
        "mixture": bool((out["mixture_weights"][..., 0] == 1).all()),
        "tokens": last["gradient_norm/perceiver"] == 0 and trainer.training_step.perception.optimizer.updates == 0,
        "adversary": "loss/discriminator" not in last and last["loss/adversarial"] == 0,
        "sum": not trainer.training_step.rgb.has_direction,
        "series": trainer.model.prior.kl_method == "series10",
        "pixels": variant != "pixels" or weighs_pixels_less_and_less(trainer),
        "late": latent_phase.falling(0.7) == 1.0 and latent_phase.falling(0.85) == pytest.approx(0.5),
    }
    assert is_so[variant]
    whole = {"tokens": last["gradient_norm/elbo"] > 0, "context": bool(out["attention"].std() > 0)}
    assert whole.get(variant, True)


def test_a_bench_goes_on_where_it_was(tmp_path, capsys):
    flags = "--steps 2 --picture-steps 1 --latent-phase-updates 0 --episodes 4 --validation-batches 1"
    command = [
        "pillars", "--data", "synthetic", "--tier", "debug", "--flags", flags, "--threads", "1", "--variants", "context", "whole",
        "--also", "--schedule cosine", "--part", "validation",
        "--context", "3", "--horizon", "5", "--clips", "1", "--samples", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    (tmp_path / "whole" / "seed0").mkdir(parents=True)
    assert bench.main(command) == 0
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed0/measured.json")}
    assert len(made) == 3
    assert json.loads((tmp_path / "schedule-cosine/seed0/spec.json").read_text())["config"]["optim"]["schedule"] == "cosine"
    lines = (tmp_path / "pillars.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["the whole model", "no context: zeros", "`--schedule cosine`"]
    capsys.readouterr()
    assert bench.main(command) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert "the whole model" in capsys.readouterr().out


def test_the_table_has_mean_and_range_over_seeds():
    def run(variant, seed, kl):
        films = {
            "horizon": 5,
            "psnr_gain_on_repeat_last_frame": {"steps_5_to_16": None},
            "action_shuffle_ratio": None,
            "model": {"psnr": [20.0] * 5},
        }
        films["psnr_gain_on_better_baseline"] = {"steps_5_to_16": None, "smallest": -1.0}
        validation = {"loss/kl_z": kl, "loss/next_token": 1.0}
        return {"variant": variant, "seed": seed, "films": {"reconstruction_psnr": 30.0 + seed, "films": films}, "validation": validation}

    lines = table([run("whole", 0, 10.0), run("whole", 1, 20.0), run("context", 0, 5.0)], 5, "head").splitlines()
    assert lines[0] == "head"
    assert "30.5 (30 to 31)" in lines[4]
    assert "15 (10 to 20)" in lines[4]
    assert lines[4].endswith("| 2 |")
    assert lines[5].startswith("| no context: zeros | 30 |")
