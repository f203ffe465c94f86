"""A file is whole and verified, or refused in one line: flipped bits, full disks, parts without data, files that point elsewhere."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from recordings import ATTRIBUTES, random_episode, seal, unseal

from aime_fast.data import DMCVBDataset, EpisodeWriter, SyntheticEpisodes
from aime_fast.data.files import PartFile
from aime_fast.errors import DataError

NAMED = {**ATTRIBUTES, "position_names": ["cart", "pole"], "policy": "ou", "versions": '{"mujoco": "3.17"}'}


def write(path: Path, episodes: int = 2, **options: int) -> Path:
    with EpisodeWriter(path, NAMED) as writer:
        for seed in range(episodes):
            positions = np.random.default_rng(seed).random((40, 2, 2), dtype=np.float32)
            writer.write(random_episode(40, seed, **options) | {"positions": positions})
    return path


def content(path: Path) -> dict:
    """Everything that a file says: attributes, lengths, identities, frames."""
    data = DMCVBDataset(path, 10)
    try:
        episodes = [{key: value.numpy().tobytes() for key, value in data.read_episode(i).items()} for i in range(data.num_episodes)]
        return {**data.attributes, "lengths": data.lengths, "identities": data.identities, "episodes": episodes, "good": data.verified}
    finally:
        data.close()


def one_line(error: DataError) -> None:
    assert ";" in str(error), f"no remedy: {error}"
    assert "\n" not in str(error)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, seed):
    path = write(tmp_path / "a.h5")
    expected, original = content(path), path.read_bytes()
    random, refused = np.random.default_rng(seed), 0
    for position in random.integers(0, len(original), 100):
        damaged = bytearray(original)
        damaged[position] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            assert content(path) == expected, f"byte {position}"
        except DataError as error:
            refused += 1
            one_line(error)
    assert refused > 50


def test_a_flipped_bit_in_any_byte_of_the_attributes_is_refused_or_changes_nothing(tmp_path):
    path = write(tmp_path / "a.h5", episodes=1)
    expected, original = content(path), path.read_bytes()
    begin = original.index(b"cartpole")
    for position in range(begin - 200, begin + 400):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert content(path) == expected, f"byte {position}"


def test_files_of_format_1_are_read_and_marked_as_unverified(tmp_path, capfd):
    path = write(tmp_path / "a.h5")
    new = content(path)
    assert capfd.readouterr().err == ""
    unseal(path)
    old = content(path)
    assert (new.pop("good"), old.pop("good")) == (True, False)
    assert old["identities"] == new["identities"]
    assert old["episodes"] == new["episodes"]
    assert capfd.readouterr().err.splitlines() == [f"{path}: an older format without checksums over its content; it is read unverified"]


def test_identities_name_the_content_and_not_the_place(tmp_path):
    two, three = DMCVBDataset(write(tmp_path / "b.h5"), 10), DMCVBDataset(write(tmp_path / "a.h5", 3), 10)
    assert three.identities[:2] == two.identities
    assert len(set(three.identities)) == 3
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in three.identities)
    synthetic = [SyntheticEpisodes(n, size, seed).identities for n, size, seed in ((4, 16, 0), (3, 16, 0), (3, 16, 1), (3, 32, 0))]
    assert synthetic[0][:3] == synthetic[1]
    assert len({name for each in synthetic for name in each}) == 10


FILL = """
import resource, sys; sys.path[:0] = sys.argv[1:3]
from test_integrity import write
from aime_fast.errors import DataError
for path, limit in zip(sys.argv[3::2], map(int, sys.argv[4::2])):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write(path, 40, image_size=8)
    except DataError as error:
        print(error)
"""


def record(*files: tuple[Path, int]) -> list[str]:
    """Write 0.4 MB of episodes to each path, by one process whose files may have as many bytes as beside it; returns the errors."""
    here = Path(__file__)
    command = [sys.executable, "-c", FILL, here.parent, here.parents[2], *(str(each) for pair in files for each in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_full_disk_gives_one_error_and_leaves_no_file(tmp_path):
    with contextlib.ExitStack() as mounts:
        disks = []
        for room in (4, 30_000, 200_000):
            disk = tmp_path / str(room)
            disk.mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False).returncode:
                pytest.skip("no right to mount a file system")
            mounts.callback(subprocess.run, ["umount", disk], check=True)
            (disk / "ballast").write_bytes(bytes(2 * 2**20 - room))
            disks.append(disk)
        errors = record(*((disk / "a.h5", resource.RLIM_INFINITY) for disk in disks))
        for disk, error in zip(disks, errors, strict=True):
            assert f"{disk}/a.h5: cannot be written (No space left on device; free some space" in error
            assert [each.name for each in disk.iterdir()] == ["ballast"]


def test_a_limited_file_size_gives_one_error_and_leaves_no_file(tmp_path):
    limits = (50, 5_000, 200_000)
    errors = record(*((tmp_path / f"{limit}.h5", limit) for limit in limits))
    for limit, error in zip(limits, errors, strict=True):
        assert f"{limit}.h5: cannot be written (File too large; raise the limit" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", range(0, 48, 3))
def test_a_disk_that_is_full_for_a_moment_leaves_no_file(tmp_path, monkeypatch, first):
    """Writes number `first` and the next fail, all others work: h5py would not report some of them."""
    write(tmp_path / "whole.h5")
    calls, real = [], PartFile._put

    def full_for_a_moment(part, view):
        calls.append(len(view))
        if len(calls) - 1 in (first, first + 1):
            raise OSError(28, os.strerror(28))
        real(part, view)

    monkeypatch.setattr(PartFile, "_put", full_for_a_moment)
    with pytest.raises(DataError, match="No space left on device"):
        write(tmp_path / "a.h5")
    assert [each.name for each in tmp_path.iterdir()] == ["whole.h5"]


def rewrite(path: Path, create) -> None:
    """Replace the rewards of the second episode by what `create(group)` makes, with valid checksums where they can be computed."""
    with h5py.File(path, "r+") as file:
        group = file["episode_00001"]
        del group["reward"]
        create(group)
    with contextlib.suppress(OSError, KeyError, TypeError):
        seal(path)


def missing_chunk(group: h5py.Group) -> None:
    group.create_dataset("reward", (40,), np.float32, chunks=(8,))[:32] = 1.0


def declared_only(group: h5py.Group) -> None:
    group.create_dataset("reward", (40,), np.float32)


def virtual(group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((40,), np.float32)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (40,))
    group.create_virtual_dataset("reward", layout)


ELSEWHERE = {
    "a chunk was never written": (missing_chunk, "'episode_00001/reward' has 4 of 5 chunks"),
    "no data at all": (declared_only, "'episode_00001/reward' has 0 of 160 bytes"),
    "external storage": (
        lambda group: group.create_dataset("reward", (40,), np.float32, external=[("/etc/passwd", 0, 160)]),
        "'episode_00001/reward' is stored in another file",
    ),
    "virtual dataset": (virtual, "'episode_00001/reward' is a virtual dataset"),
    "external link": (
        lambda group: group.__setitem__("reward", h5py.ExternalLink("/etc/x.h5", "/y")),
        "'episode_00001/reward' is an external link to /y",
    ),
    "soft link": (lambda group: group.__setitem__("reward", h5py.SoftLink("/elsewhere")), "is a soft link to /elsewhere"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_data_that_are_not_in_the_file_are_refused(tmp_path, case):
    create, message = ELSEWHERE[case]
    rewrite(write(tmp_path / "a.h5"), create)
    with pytest.raises(DataError, match=message) as error:
        content(tmp_path / "a.h5")
    one_line(error.value)


def test_an_episode_behind_a_link_is_refused(tmp_path):
    secret = write(tmp_path / "secret.h5")
    for link, kind in ((h5py.ExternalLink(str(secret), "/episode_00000"), "an external link"), (h5py.SoftLink("/none"), "a soft link")):
        path = write(tmp_path / "a.h5")
        with h5py.File(path, "r+") as file:
            file["episode_00002"] = link
        for _ in range(2):
            with pytest.raises(DataError, match=f"'episode_00002' is {kind}"):
                content(path)
            with h5py.File(path, "r+") as file:  # once more in a file without checksums
                file.attrs["format_version"] = 1


def test_declared_terabytes_without_data_are_refused_before_memory_is_taken(tmp_path):
    path = write(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        for key, dtype, shape in (("pixels", np.uint8, (8, 8, 3)), ("action", np.float32, (2,)), ("reward", np.float32, ())):
            del file[f"episode_00001/{key}"]
            file["episode_00001"].create_dataset(key, (2**36, *shape), dtype, chunks=(2**20, *shape))
    with pytest.raises(DataError, match=r"pixels' has 0 of 65536 chunks"):
        content(path)
