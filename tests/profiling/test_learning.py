"""The peer and `profiling.bench learning`: real but tiny."""

from __future__ import annotations

import itertools
import json
import shutil
import sys

import pytest
import torch
from tensordict import TensorDict

from aime_fast.config import LATENT_UPDATES, PICTURE_SHARE
from profiling import bench, bench_learning
from profiling.bench_learning import LATENT_SHARE, plan
from profiling.learning.turns import take_turns
from profiling.peers.dreamer_v3 import DreamerV3, DreamerV3Config

TINY = dict(depth=2, belief_dim=16, blocks=2, hidden_dim=16, categoricals=4, classes=3, batch_size=2, sequence_length=6)
B, T, F, A, SIZE = 2, 4, 3, 2, 16


@pytest.fixture(scope="module")
def peer() -> DreamerV3:
    made = DreamerV3(SIZE, A, seed=1, config=DreamerV3Config(**TINY))
    made.latents = "expected"  # so that a prediction is continuous in what it depends on
    return made


def batch(frames: int = T) -> TensorDict:
    torch.manual_seed(0)
    return TensorDict(
        {
            "pixels": torch.randint(0, 256, (B, frames, 3, SIZE, SIZE), dtype=torch.uint8),
            "action": torch.rand(B, frames, A) * 2 - 1,
            "reward": torch.rand(B, frames, 1),
            "is_init": torch.zeros(B, frames, 1, dtype=torch.bool),
        },
        batch_size=(B, frames),
    )


def changed(a: torch.Tensor, b: torch.Tensor) -> list[bool]:
    """Which frames of [B, F, 3, H, W] differ at all."""
    return ((a - b).abs().amax((0, 2, 3, 4)) > 0).tolist()


def test_a_frame_depends_on_the_action_before_it_and_not_on_its_own(peer):
    data, future = batch(), torch.rand(B, F, A)

    def predict(actions, future_actions):
        return peer.predict_future(data["pixels"], actions, future_actions)["reconstructions"]

    film = predict(data["action"], future)
    for i in range(F):
        other = future.clone()
        other[:, i] += 1
        assert changed(film, predict(data["action"], other)) == [j > i for j in range(F)]
    other = data["action"].clone()
    other[:, -1] += 1  # leads to the first predicted frame
    assert changed(film, predict(other, future)) == [True] * F
    other = data["action"].clone()
    other[:, 1] += 1
    seen = peer.reconstruct(data["pixels"], data["action"])
    assert changed(seen, peer.reconstruct(data["pixels"], other)) == [j > 1 for j in range(T)]


def test_training_sees_the_action_and_the_reward_that_led_to_a_frame(peer):
    data = batch()
    sequences = peer.sequences(data)
    assert sequences["action"][:, 0].eq(0).all()
    assert torch.equal(sequences["action"][:, 1:], data["action"][:, :-1])
    assert torch.equal(sequences["next", "reward"][:, 1:], data["reward"][:, :-1])
    assert sequences["is_init"].squeeze(-1).tolist() == [[True] + [False] * (T - 1)] * B


def test_prediction_walks_as_the_rollout_of_torchrl_does(peer):
    data = batch()
    torch.manual_seed(3)
    with torch.no_grad():
        out = peer.averaged(peer.sequences(data))
    torch.manual_seed(3)
    noise = torch.rand(T, 2, B, TINY["categoricals"])[:, 1].transpose(0, 1)  # as RSSMRolloutV3 draws; the other half is of its prior
    latents, _ = peer._observe(data["pixels"], peer.sequences(data)["action"], noise)
    assert torch.equal(torch.stack([latent.state for latent in latents], 1), out["next", "state"].round())
    torch.testing.assert_close(torch.stack([latent.belief for latent in latents], 1), out["next", "belief"])


def test_films_are_deterministic_and_samples_are_of_their_seeds(peer):
    data, future = batch(), torch.rand(B, F, A)

    def film(rows=slice(None), **options):
        return peer.predict_future(data["pixels"][rows], data["action"][rows], future[rows], **options)["reconstructions"]

    assert film().shape == (B, F, 3, SIZE, SIZE)
    assert torch.equal(film(), film())
    frames = data["pixels"].float() / 127.5 - 1
    torch.testing.assert_close(peer.predict_future(frames, data["action"], future)["reconstructions"], film())
    sampled = film(sample=True, seeds=[5, 6])
    assert torch.equal(sampled, film(sample=True, seeds=[5, 6]))
    assert not torch.equal(sampled, film(sample=True, seeds=[7, 6]))
    torch.testing.assert_close(film(slice(1, 2), sample=True, seeds=[6]), sampled[1:])
    peer.latents, before = "mode", peer.latents
    assert torch.equal(film(), film())
    peer.latents = before


def test_updates_lower_the_loss_and_a_saved_peer_predicts_alike():
    made, data = DreamerV3(SIZE, A, seed=0, config=DreamerV3Config(**TINY, learning_rate=3e-3, warmup_steps=1)), batch()
    losses = [sum(made.update(data).values()).item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    again = DreamerV3.from_state(made.state(), made.config)
    films = (each.predict_future(data["pixels"], data["action"], data["action"])["reconstructions"] for each in (made, again))
    assert torch.equal(*films)


def test_a_decoder_that_is_given_the_mean_frame_begins_with_it():
    made = DreamerV3(SIZE, A, config=DreamerV3Config(**TINY, mean_frame="both"))
    mean = torch.rand(3, SIZE, SIZE) - 0.5
    before = (made.reconstruct(batch()["pixels"], batch()["action"]) - mean).square().mean()
    made.give_mean_frame(mean)
    after = (made.reconstruct(batch()["pixels"], batch()["action"]) - mean).square().mean()
    assert after < 0.05 * before


def test_the_budget_is_divided_between_joint_updates_and_latent_phase():
    costs = {"picture_step": 0.5, "update": 2.0, "latent_begin": 10.0, "latent_update": 0.5}
    assert plan(600, costs, 0, 100) == (0, 270, 100, 540)
    assert plan(600, costs, 80, 100) == (80, 250, 100, 540)
    *_, latent, stop = plan(600, costs, 0, 2000)
    assert stop == pytest.approx((1 - LATENT_SHARE) * 600)
    assert stop + 10 + 0.5 * latent == pytest.approx(600)
    assert plan(12, costs, 0, 1000) == (0, 6, 0, 12)  # no time to begin one
    assert plan(600, costs, 0, 0) == (0, 300, 0, 600)
    pictures, joint, latent, stop = plan(600, costs, None, None)
    assert LATENT_UPDATES * joint == pytest.approx(latent, abs=LATENT_UPDATES)
    assert PICTURE_SHARE * (pictures + joint) == pytest.approx(pictures, abs=1)
    assert 0.5 * pictures + 2 * joint == pytest.approx(stop, abs=2)


BUSY = """
import sys, time
with open(sys.argv[1], "w") as file:
    while time.process_time() < 0.9:
        file.write(f"{time.monotonic()}\\n")
"""


def test_one_process_runs_while_the_other_is_stopped(tmp_path):
    files = {name: tmp_path / name for name in ("a", "b")}
    take_turns({name: [sys.executable, "-c", BUSY, str(file)] for name, file in files.items()}, tmp_path / "logs", 0.25, {})
    moments = sorted((float(line), name) for name, file in files.items() for line in file.read_text().splitlines())
    turns = [len(list(group)) for _, group in itertools.groupby(moments, key=lambda moment: moment[1])]
    assert 4 <= len(turns) <= 12  # thousands, did both run at once
    assert min(turns) > 100


def test_a_process_that_fails_ends_the_others(tmp_path):
    commands = {
        "waits": [sys.executable, "-c", "import time; time.sleep(100)"],
        "fails": [sys.executable, "-c", "raise SystemExit('no such data')"],
    }
    with pytest.raises(RuntimeError, match=r"fails ended with status 1: no such data \(all of it: .*fails\.log\)"):
        take_turns(commands, tmp_path, 0.02, {})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="turns are taken by /proc")
def test_bench_trains_measures_and_writes(tmp_path, capsys, monkeypatch):
    for name, value in (("POINTS", 3), ("COSTED", 4), ("COSTED_LATENT", (2, 6))):
        monkeypatch.setattr(bench_learning, name, value)
    monkeypatch.setattr(bench_learning, "LATENT_SHARE", 0.8)  # beginning a phase takes a second
    seconds, out = 6.0, tmp_path / "out"
    ours = (
        "--episodes 3 --lambda-overshoot 0 --latent-phase-updates 30 --latent-phase-frames 2 --latent-phase-batch-size 2 --log-every 1000"
    )
    arguments = f"learning --data synthetic --tier debug --minutes {seconds / 60} --seeds 0 --threads 1 --turn 1 --out {out}".split()
    arguments += ["--context", "2", "--horizon", "16", "--clips", "1", "--samples", "1"]
    arguments += [f"--ours={ours}", "--peer-config", json.dumps(TINY)]
    assert bench.main(arguments) == 0, capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"learning.json", "learning.md", "curves.png", "films.png", "seed0"}
    found = json.loads((out / "learning.json").read_text())
    assert found["versions"]["torchrl"]
    contestants = found["seeds"][0]["contestants"]
    assert list(contestants) == ["ours", "dreamer_v3"]
    for contestant in contestants.values():
        assert contestant["cost"]["seconds"] == pytest.approx(seconds, rel=0.5)
        assert contestant["cost"]["frames"] > 0
        spent = [point["seconds"] for point in contestant["curve"]]
        assert spent == sorted(spent)
        assert len(spent) >= 2
    assert contestants["ours"]["latent_phase_updates"] > 0
    assert contestants["dreamer_v3"]["latents"] in ("mode", "expected")
    table = (out / "learning.md").read_text()
    assert "| measure | ours | dreamer_v3 |" in table
    assert "| gain on the better baseline, steps 5 to 16, dB |" in table

    other, joined = tmp_path / "other", tmp_path / "joined"
    shutil.copytree(out, other, ignore=shutil.ignore_patterns("seed0"))
    with pytest.raises(SystemExit):
        bench.main(["learning", "--join", str(out), str(other), "--out", str(joined)])
    assert "a seed occurs twice in 0, 0" in capsys.readouterr().err
    found["seeds"][0]["seed"] = 1
    (other / "learning.json").write_text(json.dumps(found))
    assert bench.main(["learning", "--join", str(other), str(out), "--out", str(joined)]) == 0
    both = json.loads((joined / "learning.json").read_text())
    assert [result["seed"] for result in both["seeds"]] == [0, 1]
    assert "seeds 0 1; " in (joined / "learning.md").read_text()
    assert {path.name for path in joined.iterdir()} == {"learning.json", "learning.md", "curves.png", "films.png"}
    (other / "learning.json").write_text(json.dumps(found | {"minutes": 7}))
    with pytest.raises(SystemExit):
        bench.main(["learning", "--join", str(out), str(other), "--out", str(joined)])
    assert f"--join {other}: its minutes is not that of {out}" in capsys.readouterr().err
