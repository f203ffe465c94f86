"""Flags under old names, and what a user sees of an error."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from aime_fast.cli import parse_config, run_command
from aime_fast.config import RENAMED
from aime_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from aime_fast.multi_task_learning import LossAggregator
from aime_fast.runtime.files import replacing


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_flag_sets_the_new_field_with_a_message(old, capsys):
    flag, new = "--" + old.replace("_", "-"), RENAMED[old]
    for argv in ([flag, "7"], [f"{flag}=7"], [f"--{old}", "7"]):
        config = parse_config("train", "", ["--tier", "debug", *argv])
        assert getattr(config.optim, new, getattr(config.loss, new, None)) == 7
        assert f"is called --{new.replace('_', '-')} now" in capsys.readouterr().err


def test_old_flags_are_not_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse_config("train", "", ["--help"])
    help_text = capsys.readouterr().out
    assert "--latent-phase-updates" in help_text
    assert "--dynamics-updates" not in help_text


def test_losses_take_a_weight_under_the_name_of_the_texts():
    assert LossAggregator(lambda_att_dyn=0.7).config.lambda_attention_motion == 0.7
    with pytest.raises(TypeError, match="lambda_attention"):
        LossAggregator(lambda_attention=0.7)


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError, 2), (DataError, 2), (CheckpointError, 2), (FileNotFoundError, 2), (NonFiniteError, 3)]
)
def test_errors_that_a_user_can_mend_are_one_line_and_a_status(error, status, capsys):
    def main():
        raise error("--latent-dim 0: expected at least 1")

    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == status
    assert capsys.readouterr().err == "error: --latent-dim 0: expected at least 1\n"


def leave(main, capsys) -> tuple[int, str]:
    """The exit status and the standard error of a command."""
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    return leaving.value.code, capsys.readouterr().err


def test_a_fault_of_the_program_says_where_its_traceback_is(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, said = leave(lambda: 1 / 0, capsys)
    assert status == 1
    (file,) = tmp_path.iterdir()
    assert said.startswith("error: ZeroDivisionError: division by zero (")
    assert said.count("\n") == 1
    assert str(file) in said
    assert "Traceback" in file.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    status, said = leave(lambda: 1 / 0, capsys)
    assert (status, said.count("\n")) == (1, 1)
    assert "could not be written" in said


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("ENOSPC", "free some space"),
        ("EROFS", "read-only"),
        ("EACCES", "change its permissions"),
        ("ENOTDIR", "a file and not a folder"),
        ("EISDIR", "move it away"),
        ("ENAMETOOLONG", "shorter name"),
        ("EIO", "the disk or the network reports a fault"),
        ("EXDEV", "check the disk"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_the_remedy(name, remedy, capsys, tmp_path):
    number = getattr(errno, name)

    def main():
        with replacing(tmp_path / "a"):
            raise OSError(number, os.strerror(number))  # as of a write, which names no file

    status, said = leave(main, capsys)
    assert status == 2
    assert said.startswith(f"error: {tmp_path / 'a'}: {os.strerror(number)}; ")
    assert remedy in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), torch.OutOfMemoryError()]
)
def test_too_little_memory_is_one_line(error, capsys):
    def main():
        raise error

    status, said = leave(main, capsys)
    assert status == 2
    assert "--batch-size" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("place", ["plain", "finaliser", "replaced"])
def test_a_signal_ends_a_command_with_its_status_wherever_it_comes(signum, place, tmp_path):
    """Also where Python drops the exception, and where another error takes its place."""
    program = f"""
import os, signal, time
from aime_fast.cli import run_command
class Object:
    def __del__(self):
        os.kill(os.getpid(), {int(signum)})
        time.sleep(1)
def main():
    if {place!r} == "finaliser":
        Object()
    try:
        os.kill(os.getpid(), {int(signum)})
        time.sleep(10)
    except BaseException:
        if {place!r} == "replaced":
            raise RuntimeError("a worker died")
        raise
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signum, done.stderr
    assert done.stderr == f"interrupted by {signum.name}\n"


def test_ctrl_c_while_a_command_imports_itself_leaves_no_traceback(tmp_path):
    (tmp_path / "tyro.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])}
    done = subprocess.run(
        [sys.executable, "-m", "aime_fast.report", "x"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")  # 130 in a shell
    program = "import signal, aime_fast; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"  # a program that imports the package keeps its own


def test_signals_that_a_process_was_started_to_ignore_are_ignored():
    program = "import os, signal; from aime_fast.cli import run_command; run_command(lambda: os.kill(os.getpid(), signal.SIGHUP))"
    done = subprocess.run([sys.executable, "-c", f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {program}"], timeout=60)
    assert done.returncode == 0


def test_a_signal_during_an_import_ends_the_command_after_it(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n[None for _ in range(10**6)]\nprint('imported')\n"
    )
    found = f"import sys, time; sys.path.append({str(tmp_path)!r}); from aime_fast.cli import run_command"
    program = f"{found}; run_command(lambda: (__import__('slow'), time.sleep(9)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (143, "imported\n", "interrupted by SIGTERM\n")


def test_a_pipe_that_nobody_reads_ends_a_command_in_silence():
    program = "from aime_fast.cli import run_command; run_command(lambda: [print('x' * 1000, flush=True) for _ in range(10000)])"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert said == ""
