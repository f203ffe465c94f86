"""The commands as a user runs them, on real cartpole pixels, and the README's training loop as it is printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import command, process

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A folder in which `train` has collected data/ and written runs/."""
    folder = tmp_path_factory.mktemp("user")
    done = process("train", "--tier", "debug", "--steps", "6", "--latent-phase-updates", "4", "--run-dir", "runs/one", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "video       runs/one/prediction.mp4" in done.stdout
    return folder


def test_train_collects_data_trains_and_writes_every_output(finished_run):
    run = finished_run / "runs/one"
    assert list((finished_run / "data").glob("cartpole-swingup-32px-skip8-fast-*.h5"))
    record = json.loads((run / "run.json").read_text())
    assert record["versions"]["torch"]
    assert record["renderer"] in ("egl", "osmesa")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss/elbo" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["latent_phase/update"] for row in rows if "latent_phase/update" in row] == [1, 2, 3, 4]
    assert {"loss/kl_z", "rgb/angle_elbo", "frames_per_second"} <= set(rows[0])
    for name in ("config.yaml", "prediction.mp4", "checkpoint_00000006.pt", "samples/step_00000006.png"):
        assert (run / name).stat().st_size > 100, name
    assert (run / "prediction.mp4").read_bytes()[4:8] == b"ftyp"


def test_evaluate_writes_tables_picture_and_video(finished_run):
    done = command("evaluate", "runs/one", "--context", "4", "--horizon", "6", "--clips", "2", cwd=finished_run)
    assert done.returncode == 0, done.stderr
    assert "repeat-last-frame" in done.stdout
    folder = finished_run / "runs/one/evaluation"
    result = json.loads((folder / "evaluation.json").read_text())
    loop = result["open_loop"]
    assert len(loop["model"]["psnr"]) == len(loop["repeat_last_frame"]["ssim"]) == loop["horizon"] == 6
    assert loop["action_shuffle_ratio"] is None  # one test episode: there are no actions of another one
    assert set(loop["positions"]["by_point"]["reader_on_truth"]) == {"cart", "pole_1", "pole_1/tip"}
    assert len(loop["sample_best"]["psnr"]) == len(loop["tokens"]["rolled_out"]) == len(loop["positions"]["model"]) == 6
    assert loop["lpips"].startswith("not measured: ") or len(loop["model"]["lpips"]) == 6
    assert sum(result["calibration"]["rank_histogram"]) == pytest.approx(1)
    measured = result["reconstruction"]
    assert 0 < measured["code_usage"] <= 1
    assert 1 <= measured["effective_components"] <= 4
    assert measured["psnr"] > 5
    assert (folder / "prediction.png").stat().st_size > 1000
    assert (folder / "prediction.mp4").stat().st_size > 1000


def test_another_task_trains_by_name(tmp_path):
    task = ("--domain", "reacher", "--task", "easy", "--frame-skip", "50")
    done = command("train", "--tier", "debug", *task, "--seed", "1", "--episodes", "3", "--steps", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").glob("reacher-easy-tierdebug-seed1-*")  # a hash: --episodes and --steps are not the preset's
    assert (run / "prediction.mp4").exists()


def test_compiled_regions_train_on_a_cpu(tmp_path):
    small = ("--sequence-length", "3", "--slot-iterations", "2", "--blocks-per-level", "0")
    done = command("train", "--tier", "debug", "--data", "synthetic", "--steps", "1", *small, "--compile", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = next((tmp_path / "runs").iterdir())
    assert json.loads((run / "run.json").read_text())["compile"] == "on"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing",), "missing: neither a run's folder nor a checkpoint file"),
        (("runs/one", "--horizon", "4000"), "--horizon 4000: the longest held-out episode has"),
        (("runs/one", "--context", "0"), "--context 0"),
        (("runs/one", "--data", "nowhere.h5"), "nowhere.h5"),
        (("runs/one", "--horizont", "3"), "--horizont"),
    ],
)
def test_wrong_arguments_of_evaluate_are_named(finished_run, arguments, message):
    start = process if "--horizont" in arguments else command  # a process that ends before its long imports
    done = start("evaluate", *arguments, cwd=finished_run)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_training_loop_of_the_readme_runs_as_printed(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], "README.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"elbo -?\d+\.\d+", capsys.readouterr().out)
