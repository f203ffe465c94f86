"""What W&B and TensorBoard get, and which rows stay in metrics.jsonl when a run is resumed."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator

import pytest
from test_trainer import config_of

from aime_fast.training import DMCVBTrainer
from aime_fast.training.logging import Logger
from aime_fast.training.metrics import ResumePoint, cut_rows, parse_row, whole_rows


def with_phase(config, updates: int = 4):
    optim = dataclasses.replace(config.optim, latent_phase_frames=3, latent_phase_batch_size=4, latent_phase_updates=updates)
    return dataclasses.replace(config, optim=optim)


def records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, of pieces with checksum, length and place in the record."""
    place, whole = 7, b""  # after wandb's header
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:  # padding
            place += -place % 32768
        _, length, piece = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if piece in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


def sent_to_wandb(run_dir) -> tuple[list[dict], list[str]]:
    """The rows of wandb's offline file, and the definitions of its metrics."""
    from wandb.proto import wandb_internal_pb2

    rows, metrics = [], []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.history.item:
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            if record.HasField("metric"):
                metrics.append(f"{record.metric.name or record.metric.glob_name} over {record.metric.step_metric}")
    return rows, metrics


def test_wandb_gets_every_row_once_and_tensorboard_the_right_x(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = with_phase(config_of(tmp_path, steps=2, validate_every=1, logger=("tensorboard", "wandb")))
    DMCVBTrainer(config).train()
    DMCVBTrainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True, steps=3))).train()
    rows, metrics = sent_to_wandb(tmp_path)
    assert [row["step"] for row in rows if "loss/elbo" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "validation/psnr" in row] == [1, 2, 3]
    assert [(row["step"], row["latent_phase/update"]) for row in rows if "latent_phase/one_step" in row] == [
        (step, update) for step in (2, 3) for update in (1, 2, 3, 4)
    ]
    assert {"latent_phase/* over latent_phase/update", "* over step"} <= set(metrics)

    def events(folder, tag):
        board = EventAccumulator(str(folder)).Reload()
        return [event.step for event in board.Scalars(tag)] if tag in board.Tags()["scalars"] else []

    assert events(tmp_path / "tensorboard", "loss/elbo") == [1, 2, 3]
    assert events(tmp_path / "tensorboard", "time")[-1] == 3
    assert events(tmp_path / "tensorboard", "latent_phase/one_step") == []
    assert events(tmp_path / "tensorboard" / "latent_phase", "latent_phase/one_step") == [1, 2, 3, 4]


def test_rows_that_a_killed_run_sent_after_its_checkpoint_are_not_sent_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(tmp_path, logger=("wandb",))
    killed = Logger(tmp_path, config)
    for step in (1, 2, 3):
        killed.log(step, {"loss/elbo": float(step)})
    killed.log(3, {"validation/psnr": 3.0})
    killed.close()
    resumed = Logger(tmp_path, config, ResumePoint(2, 2))
    for step in (3, 4):
        resumed.log(step, {"loss/elbo": float(step)})
        resumed.log(step, {"validation/psnr": float(step)})
    resumed.close()
    rows, _ = sent_to_wandb(tmp_path)
    assert [row["step"] for row in rows if "loss/elbo" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation/psnr" in row] == [3, 4]
    assert [row["step"] for row in whole_rows((tmp_path / "metrics.jsonl").read_text())] == [1, 2, 3, 3, 4, 4]


TRAINING, VALIDATION = "loss/elbo", "validation/psnr"
PHASE = "latent_phase/update"


@pytest.mark.parametrize(
    ("point", "kept"),
    [
        (ResumePoint(0), []),
        (ResumePoint(2, 3), ["1 loss/elbo", "2 loss/elbo", "2 validation/psnr"]),  # goes on with updates or with the phase
        (ResumePoint(2, 2, finished=True), ["1 loss/elbo", "2 loss/elbo"]),
        (ResumePoint(2, 5, finished=True), ["1 loss/elbo", "2 loss/elbo", "2 latent_phase/update", "2 latent_phase/update"]),
        (ResumePoint(2, None), ["1 loss/elbo", "2 loss/elbo", "2 validation/psnr", "2 latent_phase/update", "2 latent_phase/update"]),
        (ResumePoint(1, 1), ["1 loss/elbo"]),
        (
            ResumePoint(9, 99),
            ["1 loss/elbo", "2 loss/elbo", "2 validation/psnr", "2 latent_phase/update", "2 latent_phase/update", "3 loss/elbo"],
        ),
    ],
)
def test_rows_that_come_again_are_dropped_on_a_resume(tmp_path, point, kept):
    path = tmp_path / "metrics.jsonl"
    written = [(1, TRAINING), (2, TRAINING), (2, VALIDATION), (2, PHASE), (2, PHASE), (3, TRAINING)]
    path.write_text("".join(json.dumps({"step": step, name: 1.0}) + "\n" for step, name in written) + '{"step": 4, "lo')
    count, dropped = cut_rows(path, point)
    rows = whole_rows(path.read_text())
    assert [f"{row['step']} {list(row)[1]}" for row in rows] == kept
    assert (count, len(dropped)) == (len(kept), 6 - len(kept))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # a line that a kill cut short is no damage


def test_a_row_is_an_object_of_numbers_with_a_step():
    assert parse_row('{"step": 1, "a": 2, "b": null, "c": "x", "d": [1], "e": NaN, "f": 1e999}') == {
        "step": 1, "a": 2, "b": None, "e": None, "f": None,
    }  # fmt: skip
    for line in ("", "1", "[]", "{}", '{"step": "1"}', '{"step": true}', '{"step": 1.5}', b"\xff", "[" * 100_000, '{"step": 1', "null"):
        assert parse_row(line) is None
    with pytest.raises(ValueError, match="row 2 is not"):
        whole_rows('{"step": 1}\nx\n{"step": 2}\n')


def test_rows_of_older_runs_have_the_present_names():
    row = parse_row('{"step": 3, "dynamics/update": 50, "loss/attention_dynamics": 0.5, "validation/loss/attention_dynamics": 0.25}')
    assert row == {"step": 3, "latent_phase/update": 50, "loss/attention_motion": 0.5, "validation/loss/attention_motion": 0.25}
