"""The command evaluates the very episodes that a run never read, whatever the data folder holds by now."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from aime_fast.config import preset
from aime_fast.data import EpisodeWriter
from aime_fast.errors import CheckpointError, ConfigError, DataError
from aime_fast.evaluate import EvaluateConfig, evaluate
from aime_fast.training import DMCVBTrainer

ATTRIBUTES = {"domain": "cartpole", "task": "swingup", "frame_skip": 8, "image_size": 32, "render_quality": "fast", "action_dim": 1}


def write_shard(path, episodes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    with EpisodeWriter(path, {**ATTRIBUTES, "seed": seed}) as writer:
        for _ in range(episodes):
            length = 24
            writer.write(
                {
                    "pixels": random.integers(0, 256, (length, 32, 32, 3), dtype=np.uint8),
                    "action": random.uniform(-1, 1, (length, 1)).astype(np.float32),
                    "reward": np.zeros(length, np.float32),
                    "discount": np.ones(length, np.float32),
                    "is_init": np.arange(length) == 0,
                }
            )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two updates on a folder of two shards."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    write_shard(folder / "data" / "m.h5", 5, 0)
    write_shard(folder / "data" / "n.h5", 5, 1)
    config = preset("debug")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data=str(folder / "data")),
        run=dataclasses.replace(config.run, steps=2, run_dir=str(folder / "run"), device="cpu"),
    )
    DMCVBTrainer(config).train()
    return folder


def measure(folder, **options) -> dict:
    result = evaluate(EvaluateConfig(str(folder / "run"), clips=1, context=3, horizon=5, samples=0, device="cpu", **options))
    return json.loads(json.dumps({name: value for name, value in result.items() if name not in ("seconds", "data")}))


def test_test_episodes_are_reported_and_stay_the_same_as_data_are_added(run):
    first = measure(run)
    assert (first["part"], first["episodes"]) == ("test", 1)
    assert first["probes"]["latents"].startswith("not measured: ")
    assert "explained_near" not in first["reconstruction"]
    assert measure(run, part="validation")["open_loop"] != first["open_loop"]
    write_shard(run / "data" / "a.h5", 4, 2)  # sorts first
    try:
        assert measure(run) == first
    finally:
        (run / "data" / "a.h5").unlink()


def test_replaced_data_are_refused(run, tmp_path):
    write_shard(tmp_path / "m.h5", 5, 7)  # of the same counts
    shutil.copy(run / "data" / "n.h5", tmp_path / "n.h5")
    aside = run / "data.aside"
    (run / "data").rename(aside)
    try:
        shutil.copytree(tmp_path, run / "data")
        with pytest.raises(DataError, match="episodes that this run was split into are missing"):
            measure(run)
    finally:
        shutil.rmtree(run / "data")
        aside.rename(run / "data")


def test_other_data_must_not_hold_training_episodes(run, tmp_path):
    write_shard(tmp_path / "other.h5", 5, 9)
    assert measure(run, data=str(tmp_path / "other.h5"), out=str(tmp_path / "out"))["part"] == "test"
    with pytest.raises(DataError, match="are training episodes of the run"):
        measure(run, data=str(run / "data" / "m.h5"))


def test_several_runs_are_summarised_beside_their_own_results(run, tmp_path):
    second = shutil.copytree(run / "run", tmp_path / "second")
    runs = (str(run / "run"), str(second))
    options = EvaluateConfig(runs, clips=1, context=3, horizon=5, samples=2, device="cpu", out=str(tmp_path / "both"), probes=False)
    summary = evaluate(options)
    assert summary == json.loads((tmp_path / "both/evaluation.json").read_text())
    each = [json.loads((Path(folder) / "evaluation/evaluation.json").read_text()) for folder in runs]
    assert [Path(one["checkpoint"]).parent for one in each] == [run / "run", second]
    value = each[0]["reconstruction"]["psnr"]
    assert summary["scalars"]["reconstruction/psnr"] == {"mean": pytest.approx(value), "spread": pytest.approx(0, abs=1e-6), "runs": 2}
    assert summary["curves"]["open_loop/mean_picture/psnr"]["mean"] == pytest.approx(each[0]["open_loop"]["mean_picture"]["psnr"])
    assert "seed" not in summary["scalars"]
    assert "probes" not in each[0]
    for wrong in ((), (runs[0], runs[0]), (runs[0], runs[0] + "/checkpoint_00000002.pt")):
        with pytest.raises(ConfigError, match="several in different folders"):
            evaluate(dataclasses.replace(options, run=wrong))
    with pytest.raises(CheckpointError, match="gone: neither"):
        evaluate(dataclasses.replace(options, run=(runs[0], "gone")))
