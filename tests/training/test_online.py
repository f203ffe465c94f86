from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from aime_fast.collect import main as collect
from aime_fast.config import preset
from aime_fast.data import DMCVBDataset
from aime_fast.data.growing import GrowingReplay
from aime_fast.errors import CheckpointError, ConfigError, DataError, Interrupted
from aime_fast.evaluate import EvaluateConfig, evaluate
from aime_fast.report import ReportConfig, report
from aime_fast.training.checkpoint import list_checkpoints
from aime_fast.training.online import OnlineTrainer
from aime_fast.training.playing import SecondPlayer
from aime_fast.training.policies import load_policy


def config_of(run_dir, **control):
    base = preset("debug")
    settings = dict(
        online=True, environment_frames=5000, seed_episodes=3, cycle_episodes=1, train_ratio=1.0, seed_train_ratio=1.0, policy_dim=16,
        latent_updates=2.0, policy_updates=3.0, imagination_starts=8, imagination_horizon=3,
    )  # fmt: skip
    return dataclasses.replace(
        base, data=dataclasses.replace(base.data, frame_skip=50), control=dataclasses.replace(base.control, **settings | control),
        optim=dataclasses.replace(base.optim, latent_phase_batch_size=8),
        run=dataclasses.replace(base.run, run_dir=str(run_dir), device="cpu"),
    )  # fmt: skip


def resumed(config):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three cycles that nothing interrupts."""
    config = config_of(tmp_path_factory.mktemp("online") / "whole")
    OnlineTrainer(config).train()
    return config


def weights(config):
    state = torch.load(list_checkpoints(config.run.run_dir)[-1], weights_only=True)
    return {name: value for part in ("ema", "model") for name, value in state[part].items()} | state["behaviour"]["actor"]


def test_it_plays_learns_and_records(whole):
    rows = [json.loads(line) for line in Path(whole.run.run_dir, "metrics.jsonl").read_text().splitlines()]
    assert [row["environment_frames"] for row in rows] == [3000, 4000, 5000]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert sorted(path.name for path in _folder(whole).iterdir()) == [f"episode_{number:07d}.h5" for number in range(5)]
    first, last = (torch.load(path, weights_only=True)["behaviour"] for path in list_checkpoints(whole.run.run_dir)[::2])
    for part in ("actor", "critic", "average_actor", "average_critic"):
        assert all(not torch.equal(value, first[part][name]) for name, value in last[part].items()), part


def _folder(config):
    return Path(config.run.run_dir) / "episodes"


def test_a_run_that_was_stopped_in_a_cycle_goes_on_as_if_it_had_not_been(whole, tmp_path, monkeypatch):
    config = config_of(tmp_path / "stopped")
    perceive = OnlineTrainer._perceive

    def stop_in_the_second(self, *arguments):
        if self.cycle == 1:
            signal.raise_signal(signal.SIGTERM)
        return perceive(self, *arguments)

    monkeypatch.setattr(OnlineTrainer, "_perceive", stop_in_the_second)
    with pytest.raises(Interrupted, match=r"cycle 1, which is lost; last good checkpoint: .*--resume"):
        OnlineTrainer(config).train()
    monkeypatch.undo()
    assert len(list(_folder(config).iterdir())) == 4  # the fourth episode is played again
    OnlineTrainer(resumed(config)).train()
    one, other = weights(whole), weights(config)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_averages_and_the_model_share_what_the_latent_phase_trains(whole):
    state = torch.load(list_checkpoints(whole.run.run_dir)[-1], weights_only=True)
    for name, value in state["ema"].items():
        if name.startswith(("recurrence.", "prior.", "outcomes.")):
            assert torch.equal(value, state["model"][name]), name
    moved = torch.load(list_checkpoints(whole.run.run_dir)[0], weights_only=True)["ema"]
    assert not torch.equal(moved["recurrence.recurrent.0"], state["ema"]["recurrence.recurrent.0"])


def test_its_policy_is_loaded_plays_and_records(whole, tmp_path):
    result = evaluate(EvaluateConfig(whole.run.run_dir, returns=True, episodes=2, out=str(tmp_path), context=4, horizon=6, device="cpu"))
    (scores,) = result.values()
    assert scores["episodes"] == 2
    recorded = json.loads((tmp_path / "returns.json").read_text())
    assert recorded["environment_frames"] == 5000
    assert len(set(recorded["returns"])) == 2  # different episodes
    plan = EvaluateConfig(
        whole.run.run_dir, returns=True, episodes=1, policy="plan", out=str(tmp_path / "plan"), context=4, horizon=6, device="cpu"
    )
    assert next(iter(evaluate(plan).values()))["episodes"] == 1
    text = report(ReportConfig(whole.run.run_dir, out=str(tmp_path / "report.html"), device="cpu")).read_text()
    assert "return of the episodes of a cycle" in text
    assert "no episodes without noise yet" in text  # the results above are elsewhere
    assert (tmp_path / "returns.mp4").stat().st_size > 0
    assert (tmp_path / "returns.png").stat().st_size > 0
    flags = ["--tier", "debug", "--frame-skip", "50", "--episodes", "1", "--out", str(tmp_path / "actor.h5"), "--no-progress"]
    collect([*flags, "--policy", whole.run.run_dir])
    recorded = DMCVBDataset(tmp_path / "actor.h5", 5)
    assert recorded.attributes["policy"] == whole.run.run_dir
    collect([*flags[:-2], str(tmp_path / "plan.h5"), "--no-progress", "--policy", whole.run.run_dir, "--plan"])
    planned = DMCVBDataset(tmp_path / "plan.h5", 5)
    assert planned.attributes["policy"] == f"plan in {whole.run.run_dir}"
    assert not torch.equal(planned[0]["action"], recorded[0]["action"])
    with pytest.raises(ConfigError, match="--plan --policy ou: noise does not plan"):
        collect(["--tier", "debug", "--out", str(tmp_path / "other.h5"), "--policy", "ou", "--plan"])
    with pytest.raises(ConfigError, match=r"--policy .*frame-skip 50, not 8; pass --frame-skip 50"):
        collect(["--tier", "debug", "--out", str(tmp_path / "other.h5"), "--policy", whole.run.run_dir])
    for flag, trained, given in (("--task", "swingup", "balance"), ("--image-size", "32", "64")):
        with pytest.raises(ConfigError, match=rf"--policy .*{flag} {trained}, not {given}; pass {flag} {trained}"):
            collect([*flags[:4], flag, given, "--out", str(tmp_path / "other.h5"), "--policy", whole.run.run_dir])
    with pytest.raises(ConfigError, match="--policy nowhere: expected random, ou, swing, mixed, or the folder"):
        collect(["--tier", "debug", "--out", str(tmp_path / "other.h5"), "--policy", "nowhere"])


def test_a_whole_evaluation_reads_the_episodes_that_the_run_held_out(whole, tmp_path):
    result = evaluate(
        EvaluateConfig(whole.run.run_dir, clips=2, context=4, horizon=6, samples=0, probes=False, out=str(tmp_path), device="cpu")
    )
    assert result["episodes"] == 1
    outcomes = result["outcomes"]
    assert outcomes["clips"] == 2
    assert len(outcomes["squared_error"]["model"]) == 6


def test_the_replay_holds_out_by_number_and_drops_the_oldest(tmp_path):
    config = preset("debug").data
    attributes = {key: getattr(config, key) for key in ("domain", "task", "frame_skip", "image_size", "render_quality")} | {"action_dim": 1}
    replay = GrowingReplay(tmp_path / "episodes", config, attributes)
    for number in range(8):
        replay.add(
            {
                "pixels": np.full((10, 32, 32, 3), number, np.uint8), "action": np.zeros((10, 1), np.float32),
                "reward": np.zeros(10, np.float32), "discount": np.ones(10, np.float32), "is_init": np.arange(10) == 0,
            }
        )  # fmt: skip
    assert [replay.part(number) for number in range(8)].count("training") == 5
    before = replay.split()
    dropped = replay.oldest(25)
    assert all(replay.part(number) == "training" for number in dropped)
    assert len(replay.split(dropped).training) == 2
    assert replay.split(dropped).training == before.training[-2:]
    assert replay.split(dropped).validation == before.validation
    replay.drop(dropped)
    training, validation = replay.batches(0, torch.device("cpu"))
    assert sum(training.lengths) == 20
    training.close()
    validation.close()
    assert GrowingReplay(tmp_path / "episodes", config, attributes, 6).files().keys() == set(range(6)) - dropped


@pytest.mark.parametrize(
    ("control", "data", "message"),
    [
        ({}, {"data": "demo.h5"}, "--data demo.h5: --online records its own episodes"),
        ({}, {"domain": "lqr", "task": "lqr_2_1"}, "its actions have no bounds"),
        ({"environment_frames": 100}, {}, "--environment-frames 100: fewer than those of --seed-episodes 3"),
        ({"environment_frames": 10**9, "replay_frames": 10**9}, {"frame_skip": 1}, "--replay-frames 1000000000: .* agent steps need"),
        ({"seed_episodes": 2}, {}, "--seed-episodes 2: expected"),
        ({"imagination_horizon": 15}, {}, "--imagination-horizon 15: with 8 frames before it longer than an episode of 20 agent steps"),
        ({}, {"sequence_length": 30}, "--sequence-length 30: longer than an episode of 20 agent steps"),
    ],
)
def test_bad_settings_are_named_before_anything_is_recorded(tmp_path, control, data, message):
    config = config_of(tmp_path / "run", **control)
    with pytest.raises(Exception, match=message):
        OnlineTrainer(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_small_replay_goes_on_as_if_it_had_not_been_stopped_before_episodes_were_deleted(tmp_path, monkeypatch):
    plain = config_of(tmp_path / "plain", replay_frames=25)
    OnlineTrainer(plain).train()
    config = config_of(tmp_path / "stopped", replay_frames=25)
    drop, calls = GrowingReplay.drop, []

    def die(self, numbers):
        calls.append(numbers)
        if len(calls) == 2:
            assert numbers
            raise KeyboardInterrupt
        drop(self, numbers)

    monkeypatch.setattr(GrowingReplay, "drop", die)
    with pytest.raises(KeyboardInterrupt):
        OnlineTrainer(config).train()
    monkeypatch.undo()
    OnlineTrainer(resumed(config)).train()
    assert {path.name for path in _folder(config).iterdir()} == {path.name for path in _folder(plain).iterdir()}
    one, other = weights(plain), weights(config)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_on_recorded_data_has_no_policy(tmp_path):
    from aime_fast.training import DMCVBTrainer

    config = preset("debug")
    data = dataclasses.replace(config.data, data="synthetic")
    run = dataclasses.replace(config.run, steps=1, run_dir=str(tmp_path / "run"), device="cpu")
    DMCVBTrainer(dataclasses.replace(config, data=data, run=run)).train()
    with pytest.raises(CheckpointError, match="has no policy; train one with"):
        load_policy(tmp_path / "run")


def test_a_task_without_reward_says_so(tmp_path, capsys):
    config = config_of(tmp_path / "run", environment_frames=3000)
    OnlineTrainer(dataclasses.replace(config, data=dataclasses.replace(config.data, task="swingup_sparse"))).train()
    assert "no reward of the seed episodes differs from another: nothing can be learnt" in capsys.readouterr().out


def test_a_player_that_ends_twice_ends_the_run(whole):
    player = SecondPlayer(GrowingReplay(_folder(whole), whole.data, {}, 9), 0)

    def kill():
        for process in player._pool._processes.values():
            process.kill()

    try:
        player.begin(list_checkpoints(whole.run.run_dir)[-1], 1)
        with pytest.raises(DataError, match=r"ended twice; .* goes on from its last checkpoint with --resume"):
            player.finish(kill)
    finally:
        player.close()
    assert len(list(_folder(whole).iterdir())) == 5


def test_episodes_played_beside_are_the_same_whatever_is_stopped_or_dies(tmp_path, monkeypatch):
    """A second process plays by the policy of the cycle before; a run stopped in its third cycle, and one whose player is killed once."""
    plain = config_of(tmp_path / "plain", plays_beside=True, environment_frames=6000)
    OnlineTrainer(plain).train()
    config = config_of(tmp_path / "stopped", plays_beside=True, environment_frames=6000)
    perceive = OnlineTrainer._perceive

    def disturb(self, *arguments):
        if self.cycle == 1:
            for process in self.second._pool._processes.values():
                process.kill()
        if self.cycle == 2:
            signal.raise_signal(signal.SIGTERM)
        return perceive(self, *arguments)

    monkeypatch.setattr(OnlineTrainer, "_perceive", disturb)
    with pytest.raises(Interrupted):
        OnlineTrainer(config).train()
    monkeypatch.undo()
    OnlineTrainer(resumed(config)).train()
    one, other = weights(plain), weights(config)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
