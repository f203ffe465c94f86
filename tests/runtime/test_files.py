"""Files that several processes write at once, and files that other programs write."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from aime_fast.runtime.files import replacing, write_text


def test_two_writers_of_one_file_take_turns(tmp_path):
    """The second begins when the first has finished: neither renames what the other is writing."""
    path, order = tmp_path / "a.txt", []

    def second():
        write_text(path, "second")
        order.append("second")

    with replacing(path) as file:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        file.write(b"first" * 1000)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_writer_that_waited_for_one_that_failed_writes_its_own(tmp_path):
    path = tmp_path / "a.txt"
    thread = threading.Thread(target=write_text, args=(path, "second"))

    def fails():
        with replacing(path) as file:
            file.write(b"first")
            thread.start()
            time.sleep(0.2)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    thread.join()
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_writer_left_is_not_mixed_in(tmp_path):
    (tmp_path / "a.txt.tmp").write_text("left by a kill, and longer")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_being_replaced_can_be_written_out_of_order(tmp_path):
    """As an archive is, whose table of contents is put right at its end."""
    with replacing(tmp_path / "a.zip") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("name", "content")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        assert archive.read("name") == b"content"


def test_a_program_that_outlives_a_killed_writer_keeps_the_file(tmp_path):
    """Until ffmpeg, say, has ended, no other process writes what it still writes."""
    program = "import sys, time; file = open(sys.argv[1], 'wb'); time.sleep(1); file.write(b'late'); file.close()"
    writer = f"""
import os, subprocess, sys
from aime_fast.runtime.files import replacing
with replacing({str(tmp_path / "a.mp4")!r}) as file:
    subprocess.Popen([sys.executable, "-c", {program!r}, file.name], pass_fds=(file.fileno(),))
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", writer], cwd=Path(__file__).parents[2], check=False)
    began = time.monotonic()
    write_text(tmp_path / "a.mp4", "new")
    assert time.monotonic() - began > 0.3
    time.sleep(1.2)
    assert (tmp_path / "a.mp4").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.mp4"]
