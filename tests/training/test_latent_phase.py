"""The latent phase: what it scores and trains, and that it survives being stopped."""

from __future__ import annotations

import dataclasses
import itertools
import signal
from pathlib import Path

import pytest
import torch
from models import make_batch, make_model

from aime_fast.config import Config, preset
from aime_fast.data import make_batches
from aime_fast.errors import ConfigError, Interrupted, NonFiniteError
from aime_fast.imagination.overshooting import latent_overshooting
from aime_fast.imagination.sequence import infer_latents
from aime_fast.multi_task_learning.losses import mixture_log_prob
from aime_fast.training import DMCVBTrainer
from aime_fast.training.checkpoint import load_model
from aime_fast.training.latent_phase import CONTEXT, OUTCOMES, LatentPhase, LatentReplay

TAUGHT = ("recurrence.", "prior.", "outcomes.", "attention.prior.", "attention.posterior.seed.")


def config_of(run_dir: Path, **optim) -> Config:
    config = preset("debug")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data="synthetic", episodes=4),
        optim=dataclasses.replace(config.optim, latent_phase_frames=3, latent_phase_batch_size=4, **optim),
        run=dataclasses.replace(config.run, device="cpu", steps=2, validate_every=0, sample_every=0, run_dir=str(run_dir)),
    )


def stop_after(monkeypatch, updates: int) -> None:
    """SIGTERM comes in this update of a latent phase."""
    update = LatentPhase.update

    def update_and_end(phase):
        update(phase)
        if phase.made == updates:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(LatentPhase, "update", update_and_end)


@torch.no_grad()
def test_one_frame_rolled_out_is_the_one_step_prior(monkeypatch):
    model = make_model()
    mean_sticks = model.prior.forward
    monkeypatch.setattr(model.prior, "forward", lambda *inputs, **_: mean_sticks(*inputs[:4], sample=False))
    video, actions = make_batch(model, 3, 2)
    seen, latents = model.infer(video, actions), infer_latents(model, video, actions, *torch.ones(2, 3, 2, dtype=torch.float64))
    terms = latent_overshooting(model, latents._replace(logvar=torch.full_like(latents.logvar, -60.0)), 1, attends=True)
    p = seen.prior
    nll = -mixture_log_prob(seen.posterior.mean, p.log_weights, p.means, p.logvars).unflatten(0, (3, 2))
    torch.testing.assert_close(terms["one_step"], nll.mean())
    rolled = -mixture_log_prob(seen.posterior.mean, p.log_weights, p.means, model.prior.spread(p.features).unsqueeze(1))
    torch.testing.assert_close(terms["rolled_out"], rolled.unflatten(0, (3, 2))[:, 1].mean())
    torch.testing.assert_close(terms["seeds"], torch.zeros_like(terms["seeds"]), atol=1e-9, rtol=0)


def test_it_improves_prediction_and_leaves_perception_and_decoder_alone():
    config = config_of(Path())
    training, validation = make_batches(config.data, 0)
    model = make_model().float().requires_grad_(False)
    assert training.action_dim == model.action_dim
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optim = dataclasses.replace(config.optim, latent_phase_updates=60, latent_phase_batch_size=8, latent_phase_learning_rate=3e-3)
    torch.manual_seed(0)
    phase = LatentPhase(model, LatentReplay(model, training, 11), LatentReplay(model, validation, 11), optim)
    first = phase.measure()
    assert phase.measure() == first
    for _ in range(60):
        phase.update()
    last = phase.measure()
    phase.close()
    for name in ("one_step", "rolled_out"):
        assert last[name] < first[name] - 1.0, name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(TAUGHT) for name in changed)
    assert {prefix for prefix in TAUGHT if any(name.startswith(prefix) for name in changed)} == set(TAUGHT)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_weights_that_predict_held_out_episodes_best_are_kept(tmp_path, monkeypatch):
    """Also where the phase is stopped after they were there."""
    costs, seen = iter([4.0, 2.0, 3.0, 5.0]), []

    def measure(phase):
        seen.append({name: value.clone() for name, value in phase.model.state_dict().items()})
        return {"one_step": 1.0, "rolled_out": next(costs)}

    monkeypatch.setattr(LatentPhase, "measure", measure)
    stop_after(monkeypatch, 3)
    config = config_of(tmp_path, latent_phase_updates=4, keep_best_latent_phase=True)
    with pytest.raises(Interrupted):
        DMCVBTrainer(config).train()
    assert len(seen) == 3
    DMCVBTrainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))).train()
    model, _, info = load_model(tmp_path)
    assert info["latent_phase_updates"] == 2
    kept = model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())
    assert any(not torch.equal(kept[name], value) for name, value in seen[3].items())


def test_what_the_updates_of_a_phase_imagine(monkeypatch):
    """Few frames at first and all in the end, every other time samples; attention is scored with and without them."""
    config = config_of(Path(), latent_phase_updates=10)
    training, validation = make_batches(config.data, 0)
    model = make_model().float().requires_grad_(False)
    replays = [LatentReplay(model, batches, 18) for batches in (training, validation)]
    imagined, sampled, attended = [], [], []

    def score(model, pieces, frames, attends, sample=False, outcome_share=1.0):
        assert pieces.mean.shape[1] == CONTEXT + frames
        for made, what in ((imagined, frames), (sampled, sample), (attended, attends)):
            made.append(what)
        return latent_overshooting(model, pieces, frames, attends, sample, outcome_share)

    monkeypatch.setattr("aime_fast.training.latent_phase.latent_overshooting", score)
    phase = LatentPhase(model, *replays, dataclasses.replace(config.optim, latent_phase_frames=10))
    for _ in range(10):
        phase.update()
    assert imagined == sorted(imagined)
    assert imagined[0] == 2
    assert imagined[6:] == [10] * 4
    assert sampled == [False, True] * 5
    assert {sample for sample, attends in zip(sampled, attended) if attends} == {False, True}
    phase.measure()
    assert (imagined[-1], sampled[-1], attended[-1]) == (10, False, True)
    phase.close()
    for batches in (training, validation):
        batches.close()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_outcomes_of_a_share_of_the_pieces_are_scored(share):
    model = make_model()
    video, actions = make_batch(model, 4, 12)
    pieces = infer_latents(model, video, actions, torch.rand(4, 12).double(), torch.ones(4, 12).double())
    scored, unknown = round(4 * share), pieces.reward.clone()
    unknown[scored:] = torch.nan  # where a reward is not scored, nothing reads it
    torch.manual_seed(0)
    terms = latent_overshooting(model, pieces._replace(reward=unknown), 3, attends=False, outcome_share=share)
    assert (set(terms) & set(OUTCOMES)) == (set(OUTCOMES) if scored else set())
    assert all(term.isfinite() for term in terms.values())
    torch.manual_seed(0)
    whole = latent_overshooting(model, pieces, 3, attends=False)
    for name in set(terms) - (set(OUTCOMES) if share < 1 else set()):
        torch.testing.assert_close(terms[name], whole[name])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_weight_of_outcomes_holds_in_the_phase(weight):
    config = config_of(Path(), latent_phase_updates=2)
    training, validation = make_batches(config.data, 0)
    model = make_model().float().requires_grad_(False)
    before = model.outcomes.heads.weight.clone()
    phase = LatentPhase(model, LatentReplay(model, training, 11), LatentReplay(model, validation, 11), config.optim, outcome_weight=weight)
    for _ in range(2):
        phase.update()
    assert torch.equal(model.outcomes.heads.weight, before) == (weight == 0)
    assert phase.measure()["outcome"] > 0  # is measured all the same
    phase.close()
    for batches in (training, validation):
        batches.close()


def test_a_phase_added_by_a_resume_equals_one_planned_from_the_start(tmp_path):
    DMCVBTrainer(config_of(tmp_path / "whole", latent_phase_updates=3)).train()
    DMCVBTrainer(config_of(tmp_path / "later")).train()
    later = config_of(tmp_path / "later", latent_phase_updates=3)
    later = dataclasses.replace(later, run=dataclasses.replace(later.run, resume=True))
    trainer = DMCVBTrainer(later)
    before = {name: value.clone() for name, value in trainer.ema.state_dict().items()}
    trainer.train()
    whole, found = (torch.load(tmp_path / name / "checkpoint_00000002.pt", weights_only=True) for name in ("whole", "later"))
    for name, value in whole["ema"].items():
        torch.testing.assert_close(found["ema"][name], value, rtol=0, atol=0)
    assert any(not torch.equal(before[name], value) for name, value in found["ema"].items())
    assert found["latent_phase"]["made"]["latent_phase_updates"] == 3

    again = DMCVBTrainer(later)  # nothing is left to do
    again._save = lambda: pytest.fail("the phase was made again")
    again.train()


def test_joint_updates_and_other_phases_go_on_from_before_the_phase(tmp_path):
    def averages(name: str, steps: int, updates: int, resume: bool = False) -> dict[str, torch.Tensor]:
        config = config_of(tmp_path / name, latent_phase_updates=updates)
        DMCVBTrainer(dataclasses.replace(config, run=dataclasses.replace(config.run, steps=steps, resume=resume))).train()
        return torch.load(tmp_path / name / f"checkpoint_{steps:08d}.pt", weights_only=True)["ema"]

    straight = averages("straight", 4, 0)
    averages("stopped", 2, 3)
    stopped = averages("stopped", 4, 0, resume=True)
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    once = averages("straight", 4, 5, resume=True)
    averages("stopped", 4, 3, resume=True)
    twice = averages("stopped", 4, 5, resume=True)
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert not all(torch.equal(once[name], straight[name]) for name in once)


def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(monkeypatch):
    config = config_of(Path(), latent_phase_updates=1)
    training, validation = make_batches(config.data, 0)
    model = make_model().float().requires_grad_(False)
    replays = [LatentReplay(model, batches, 11) for batches in (training, validation)]
    replays[0].frames.context.fill_(float("nan"))
    phase = LatentPhase(model, *replays, config.optim)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"update 1: .*one_step.* not finite.*--latent-phase-learning-rate"):
        phase.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.cuda
def test_a_captured_phase_is_the_eager_one():
    """Twelve updates of all kinds; the frames that are imagined grow, so graphs are made and dropped."""
    config = config_of(Path(), latent_phase_updates=40)
    weights = []
    for captures in (False, True):
        training, validation = make_batches(config.data, 0, torch.device("cuda"))
        model = make_model().float().cuda().requires_grad_(False)
        phase = LatentPhase(
            model, *(LatentReplay(model, batches, 11) for batches in (training, validation)), config.optim, captures=captures
        )
        weights.append([phase.optimizer.parameters.clone()])
        for _ in range(40):
            phase.update()
        phase.check()
        assert bool(phase.graphs and phase.graphs.by_key) == captures
        weights[-1].append(phase.optimizer.parameters)
        training.close()
        validation.close()
    (start, eager), (same, captured) = weights
    assert torch.equal(start, same)
    assert (captured - eager).norm() < 0.05 * (eager - start).norm()


@pytest.mark.parametrize("ends", ["signal", "fault"])
def test_a_phase_that_is_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch, ends):
    """A signal saves where the phase is; a fault leaves the last checkpoint that was due, here two updates earlier."""
    config = config_of(tmp_path / "stopped", latent_phase_updates=5)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, checkpoint_every=2))
    update = LatentPhase.update

    def update_and_end(phase):
        if phase.made == 3 and ends == "fault":
            raise OSError(5, "the disk is gone")
        update(phase)
        if phase.made == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(LatentPhase, "update", update_and_end)
    with pytest.raises(Interrupted if ends == "signal" else OSError):
        DMCVBTrainer(config).train()
    monkeypatch.undo()
    made = 4 if ends == "signal" else 2
    assert load_model(tmp_path / "stopped")[2]["latent_phase_updates"] == made

    begun = []
    monkeypatch.setattr(LatentPhase, "update", lambda phase: begun.append(phase.made) or update(phase))
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    DMCVBTrainer(resumed).train()
    assert begun == list(range(made, 5))
    whole = dataclasses.replace(config, run=dataclasses.replace(config.run, run_dir=str(tmp_path / "whole")))
    DMCVBTrainer(whole).train()
    one, other = (torch.load(tmp_path / name / "checkpoint_00000002.pt", weights_only=True) for name in ("whole", "stopped"))
    assert all(torch.equal(value, other["ema"][name]) for name, value in one["ema"].items())
    assert torch.equal(one["rng"]["cpu"], other["rng"]["cpu"])


def test_other_settings_begin_a_phase_again(tmp_path, monkeypatch):
    """A phase stopped half-way, resumed with another learning rate, is that of the other rate from its first update."""
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        DMCVBTrainer(config_of(tmp_path / "stopped", latent_phase_updates=4)).train()
    monkeypatch.undo()
    for name in ("stopped", "whole"):
        config = config_of(tmp_path / name, latent_phase_updates=4, latent_phase_learning_rate=5e-3)
        DMCVBTrainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))).train()
    one, other = (torch.load(tmp_path / name / "checkpoint_00000002.pt", weights_only=True)["ema"] for name in ("whole", "stopped"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_pieces_are_what_is_inferred_of_the_frames_of_one_episode():
    model = make_model().float().requires_grad_(False)
    training, validation = make_batches(config_of(Path()).data, 0)
    replay = LatentReplay(model, training, 11)
    episode = training.episode(1)
    alone = infer_latents(model, *(episode[name][None] for name in ("pixels", "action")), *(episode[n].T for n in ("reward", "discount")))
    frames = slice(training.lengths[0], training.lengths[0] + training.lengths[1])
    for found, expected in zip(replay.frames, alone):
        torch.testing.assert_close(found[frames], expected[0], rtol=0, atol=0)
    count = len(replay.frames.actions)
    replay.frames.actions[:, 0] = torch.arange(count)  # an action says which frame it is of
    ends = list(itertools.accumulate(training.lengths))
    for length in (11, 4):
        drawn = replay.draw(20_000, length)
        assert drawn.mean.shape == (20_000, length, model.latent_dim)
        rows = drawn.actions[..., 0].long()  # [20000, length]
        assert torch.equal(rows, rows[:, :1] + torch.arange(length))
        assert set(rows[:, 0].tolist()) == set(range(count)) - {end - k for end in ends for k in range(1, length)}  # all places
    training.close()
    validation.close()


@pytest.mark.parametrize(
    ("optim", "says"), [({"latent_phase_frames": 200}, "take fewer"), ({"latent_phase_batch_size": 0}, "--latent-phase-batch-size 0")]
)
def test_an_impossible_phase_is_refused_before_training(optim, says, tmp_path):
    config = config_of(tmp_path, latent_phase_updates=1)
    with pytest.raises(ConfigError, match=says):
        DMCVBTrainer(dataclasses.replace(config, optim=dataclasses.replace(config.optim, **optim)))


def test_a_phase_that_is_given_up_half_way_is_undone(tmp_path, monkeypatch):
    """`--resume --latent-phase-updates 0` after a stop leaves the weights of the joint updates; a finished phase stays."""
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted, match="stopped after step 2, update 2 of the latent phase; saved"):
        DMCVBTrainer(config_of(tmp_path / "given up", latent_phase_updates=4)).train()
    monkeypatch.undo()
    for name in ("given up", "without"):
        config = config_of(tmp_path / name)
        DMCVBTrainer(dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))).train()
    one, other = (torch.load(tmp_path / name / "checkpoint_00000002.pt", weights_only=True) for name in ("without", "given up"))
    assert other["latent_phase"] is None
    assert all(torch.equal(value, other["ema"][name]) for name, value in one["ema"].items())


def test_a_short_phase_infers_no_more_frames_than_it_draws():
    training, validation = make_batches(config_of(Path()).data, 0)
    model = make_model().float()
    assert len(training.lengths) == 2
    few = LatentReplay(model, training, 11, limit=training.lengths[0] // 11)
    assert len(few.frames.mean) == training.lengths[0]
    more = LatentReplay(model, training, 11, limit=training.lengths[0] // 11 + 1)
    assert len(more.frames.mean) == sum(training.lengths)
    for batches in (training, validation):
        batches.close()
