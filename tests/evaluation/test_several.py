"""Mean and spread over runs."""

from __future__ import annotations

import pytest

from aime_fast.evaluation.several import print_summary, summarise


def result(value: float, seed: int, curve: list[float | None], **more) -> dict:
    inner = {"psnr": curve, "met": value > 1, "wanted": 3.0}
    return {"checkpoint": "a.pt", "seed": seed, "reconstruction": {"psnr": value, "ssim": None}, "open_loop": {"model": inner}, **more}


def test_mean_and_sample_standard_deviation_of_every_number(capsys):
    summary = summarise({"one": result(1.0, 0, [1, None]), "two": result(2.0, 1, [3, 5]), "three": result(6.0, 2, [5, 7], extra=4)})
    assert summary["runs"] == ["one", "two", "three"]
    assert summary["scalars"] == {
        "reconstruction/psnr": {"mean": 3.0, "spread": pytest.approx(7**0.5), "runs": 3},
        "extra": {"mean": 4.0, "spread": None, "runs": 1},
    }
    assert summary["curves"] == {"open_loop/model/psnr": {"mean": [3, 6], "spread": [2, pytest.approx(2**0.5)]}}
    print_summary(summary)
    printed = capsys.readouterr().out
    assert "3 runs: one, two, three" in printed
    assert "reconstruction/psnr      3.0000      2.6458     3" in printed


def test_curves_of_different_lengths_are_not_averaged():
    assert summarise({"one": result(1.0, 0, [1]), "two": result(1.0, 0, [1, 2])})["curves"] == {}
