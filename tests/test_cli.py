"""Flags under old names, and what a user sees of an error."""

from __future__ import annotations

import pytest

from aime_fast.cli import parse_config, run_command
from aime_fast.config import RENAMED
from aime_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from aime_fast.multi_task_learning import LossAggregator


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


def test_a_fault_of_the_program_is_not_caught():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
