"""Unpacked frames on a disk that is too small, in a process that is killed, and in several processes of one machine."""

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from recordings import SMALL

from aime_fast.data import SyntheticEpisodes, make_batches
from aime_fast.data.replay import Replay
from aime_fast.errors import DataError
from aime_fast.runtime.ranks import Ranks


def unpack(episodes: int = 4) -> Replay:
    """2 MB of frames at the default number of episodes."""
    source = SyntheticEpisodes(episodes, 40, seed=0)
    offsets = [100 * i for i in range(episodes + 1)]
    return Replay(source, list(range(episodes)), offsets, torch.device("cpu"), resident=False)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """The temporary folder, on a disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_gives_one_error_before_a_frame_is_written(disk):
    with pytest.raises(DataError, match=r"disk: 0\.00179 GiB of unpacked episodes .*No space left on device.*set TMPDIR to a folder"):
        unpack()
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_afterwards_does_not_matter(disk):
    tensors = unpack(1).frames  # 0.5 MB
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    tensors["pixels"].fill_(7)  # would be SIGBUS in a map whose space is not reserved
    assert tensors["pixels"].eq(7).all()


@pytest.mark.parametrize("folder", ["missing", "a file"])
def test_an_unusable_temporary_folder_gives_one_error(tmp_path, monkeypatch, folder):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    with pytest.raises(DataError, match=rf"{folder}: .* cannot be stored there .*; set TMPDIR to a folder"):
        unpack(1)


def test_a_limit_on_the_size_of_files_gives_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DataError, match="File too large"):
            unpack()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


UNPACK = """
import sys; sys.path[:0] = sys.argv[1:]
from test_replay_disk import unpack
print("begin", flush=True)
replay = unpack(400)
"""


def test_a_kill_leaves_nothing(tmp_path):
    here = Path(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", UNPACK, here.parent, here.parents[2]], env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    time.sleep(0.3)
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert f"{tmp_path}/" in mapped, "it does not unpack yet, or no more"
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("aime_fast")]
    process.kill()
    process.communicate()
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("aime_fast")]


def test_the_space_is_given_back_with_the_replay(disk):
    free = os.statvfs(disk).f_bavail
    replay = unpack(1)
    assert os.statvfs(disk).f_bavail < free - 100
    del replay
    assert os.statvfs(disk).f_bavail == free


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """What each of two processes has found: `rank_replays.py`."""
    folder, here = tmp_path_factory.mktemp("ranks"), Path(__file__)
    (folder / "disk").mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (here.parent, here.parents[2])))
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(here.with_name("rank_replays.py")), str(folder)],
        env=variables, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return [{**each, "said": done.stderr, "left": list((folder / "disk").iterdir())} for each in found]


def test_one_process_of_a_machine_unpacks_and_the_others_map_its_files(two_processes):
    alone = [float(x.double().sum()) for x in unpack().frames.values()]
    reads = {"together": [4, 0], "on two machines": [4, 4], "out of sight": [4, 4], "again": [4, 0]}
    for name, expected in reads.items():
        assert [each[name]["read"] for each in two_processes] == expected
        assert [each[name]["sums"] for each in two_processes] == [alone, alone]
        first, second = (set(each[name]["mapped"]) for each in two_processes)
        assert len(first) == len(second) == 5
        assert first == second if expected == [4, 0] else not first & second
    said = two_processes[0]["said"]
    assert said.count("episodes that another process has unpacked cannot be mapped (/proc/") == 1
    assert "another file; check the disk and the path): unpacking them again" in said
    assert two_processes[0]["left"] == []


def test_processes_that_unpack_together_share_the_batches_of_one(two_processes):
    parts = make_batches(dataclasses.replace(SMALL, prefetch=0), 0)
    for whole, *shares in zip((next(part)["action"] for part in parts), *(each["batches"] for each in two_processes), strict=True):
        assert shares == [Ranks(rank, 2).own(whole).tolist() for rank in range(2)]
    for part in parts:
        part.close()


def test_an_error_in_one_process_that_unpacks_ends_all(two_processes):
    first, second = two_processes
    assert first["damaged"]["error"] == ["DataError", "a.h5: episode 2 is damaged"]
    assert second["damaged"]["error"] == ["RankError", "process 0 of this run has failed: a.h5: episode 2 is damaged"]
    assert second["not mapped"]["error"] == ["OSError", "[Errno 12] Cannot allocate memory"]
    assert first["not mapped"]["error"] == ["RankError", "process 1 of this run has failed: [Errno 12] Cannot allocate memory"]
    assert first["seconds"] < 60
