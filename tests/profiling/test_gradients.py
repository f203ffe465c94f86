"""Gradient norms by term and module: a term reaches what it should, by its weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aime_fast.config import preset
from aime_fast.errors import ConfigError
from aime_fast.training import DMCVBTrainer
from profiling.gradients import PARTS, GradientsConfig, main, measure


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    config, folder = preset("debug"), tmp_path_factory.mktemp("run")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data="synthetic"),
        run=dataclasses.replace(config.run, run_dir=str(folder), steps=2, validate_every=0, sample_every=0, device="cpu"),
    )
    DMCVBTrainer(config).train()
    return folder


def reached(values: dict[str, float]) -> set[str]:
    return {part for part in PARTS if values[part] > 0}


def test_terms_reach_their_modules_by_their_weights(run):
    measured = measure(GradientsConfig(str(run), batches=1, device="cpu"))
    assert "gram" not in measured  # its weight is 0
    assert reached(measured["kl_attention"]) == {"attention.posterior", "attention.prior"}
    assert reached(measured["attention_motion"]) == {"attention.prior"}  # maps must not learn to stand still
    assert reached(measured["next_token"]) >= {"perceiver_io.predictor"}
    assert {"encoder", "decoder"} <= reached(measured["recon"])
    changed = measure(GradientsConfig(str(run), batches=1, device="cpu", set=("lambda_gram=0.5", "lambda_attention_motion=0.3")))
    assert reached(changed["gram"]) == {"encoder"}
    for part in ("weighed", "attention.prior"):
        assert changed["attention_motion"][part] == pytest.approx(3 * measured["attention_motion"][part], rel=1e-4)
        assert changed["kl_attention"][part] == pytest.approx(measured["kl_attention"][part], rel=1e-6)


def test_the_command_prints_every_term_and_names_a_wrong_weight(run, capsys):
    main(["--run", str(run), "--batches", "1", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["term", "weighed", *(part.removeprefix("perceiver_io.") for part in PARTS)]
    assert {"recon", "kl_z", "diversity", "generator"} <= {line.split()[0] for line in lines[2:]}
    with pytest.raises(ConfigError, match=r"--set lambda_grm=1: expected NAME=NUMBER with one of .*lambda_gram"):
        measure(GradientsConfig(str(run), set=("lambda_grm=1",), device="cpu"))
