"""The job files of docs/slurm, run here: `srun` starts its command, `scontrol` notes what it is asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aime_fast.data import DMCVBDataset

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "docs" / "slurm"
STUBS = {
    "srun": 'exec "$@"\n',
    "scontrol": 'echo "$@" >> "$(dirname "$0")/asked"\n[[ $1 == show ]] && echo localhost || true\n',
    "python": f'exec {sys.executable} "$@"\n',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
}
TINY = [
    *("--tier", "debug", "--data", "synthetic", "--batch-size", "4", "--stills", "0", "--threads", "1", "--latent-phase-updates", "0"),
    *("--validate-every", "0", "--sample-every", "0", "--checkpoint-every", "2", "--device", "cpu"),
]


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Variables of a job on a machine with the stubs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "PROCESSES_PER_NODE": "2", "PORT": "0"}
    return os.environ | job | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_job_files_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, *sorted(JOBS.glob("*.sbatch"))], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_job_whose_time_is_up_saves_enters_the_queue_again_and_goes_on(tmp_path, cluster):
    run_dir = tmp_path / "run"
    command = ["bash", str(JOBS / "train.sbatch"), *TINY, "--run-dir", str(run_dir)]
    with open(tmp_path / "out", "w+") as out:
        job = subprocess.Popen([*command, "--steps", "100000"], env=cluster, stdout=out, stderr=out)
        until = time.monotonic() + 120
        while not list(run_dir.glob("checkpoint_*.pt")) and time.monotonic() < until and job.poll() is None:
            time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        status = job.wait(timeout=90)
        out.seek(0)
        said = out.read()
    assert status == 0, said
    assert "interrupted by SIGTERM: stopped after step" in said
    assert "requeue 7" in (tmp_path / "bin" / "asked").read_text()
    saved = max(int(path.stem.removeprefix("checkpoint_")) for path in run_dir.glob("checkpoint_*.pt"))
    alone = cluster | {"PROCESSES_PER_NODE": "1"}
    again = subprocess.run([*command, "--steps", str(saved + 2)], env=alone, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows})[-1] == saved + 2
    assert "requeue" not in (tmp_path / "bin" / "asked").read_text().splitlines()[-1]


def test_an_array_of_jobs_records_one_data_set(tmp_path, cluster):
    settings = ("--tier", "debug", "--frame-skip", "50", "--episodes", "3", "--workers", "1")
    for task in (1, 2):
        array = cluster | {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in {"ID": task, "MIN": 1, "MAX": 2, "COUNT": 2}.items()}
        command = ["bash", str(JOBS / "collect.sbatch"), "episodes", *settings]
        done = subprocess.run(command, env=array, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    data = DMCVBDataset(tmp_path / "episodes", 5)
    assert data.num_episodes == len(set(data.identities)) == 3
