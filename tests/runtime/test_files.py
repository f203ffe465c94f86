"""Files that several processes write at once, and files that other programs write."""

from __future__ import annotations

import os
import threading
import time

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
