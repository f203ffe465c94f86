"""Batches hold the right frames, depend only on the seed, and resume exactly."""

import dataclasses
import gc
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import SMALL, equal

from aime_fast.data import SyntheticEpisodes, make_batches, normalise
from aime_fast.data.batches import SequenceBatches
from aime_fast.data.windows import Windows
from aime_fast.errors import DataError, UserError


@pytest.fixture
def batches():
    made = []

    def make(seed=0, **changed):
        made.extend(pair := make_batches(dataclasses.replace(SMALL, **changed), seed))
        return pair

    yield make
    for each in made:
        each.close()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), t=st.integers(1, 12), batch_size=st.integers(1, 9), seed=st.integers(0, 3))
def test_windows_cover_every_frame_within_its_episode(data, t, batch_size, seed):
    lengths = data.draw(st.lists(st.integers(t, 45), min_size=1, max_size=4))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    windows = Windows(lengths, t, batch_size, seed)
    for epoch in range(2):
        drawn = [windows.batch(epoch * windows.steps_per_epoch + i) for i in range(windows.steps_per_epoch)]
        rows = torch.cat(drawn).numpy()
        assert rows.shape == (windows.steps_per_epoch * batch_size, t)
        assert (np.diff(rows, axis=1) == 1).all()
        assert (owner[rows] == owner[rows[:, :1]]).all(), "a sequence crosses an episode boundary"
        if windows._count.sum() % batch_size == 0:
            assert len(np.unique(rows)) == len(owner), "a frame is missing from the epoch"
            assert rows.size < sum(n + 2 * t for n in lengths)


def test_batches_hold_the_frames_of_the_source(batches):
    train, _ = batches()
    source = SyntheticEpisodes(SMALL.episodes, SMALL.image_size, seed=0)
    whole = {train.episodes[i]: train.episode(i) for i in range(len(train.episodes))}
    for index, episode in whole.items():
        assert equal(episode, source.read_episode(index))
        assert episode["is_init"].flatten().nonzero().tolist() == [[0]]
    starts = 0
    for batch in itertools.islice(train, 2 * train.steps_per_epoch):
        assert batch.shape == (4, 7)
        for sequence in batch:
            matches = [
                (index, begin)
                for index, episode in whole.items()
                for begin in (episode["action"] == sequence["action"][0]).all(-1).nonzero().flatten().tolist()
                if equal(episode[begin : begin + 7], sequence)
            ]
            assert len(matches) == 1
            assert sequence["is_init"].any() == (matches[0][1] == 0)
            starts += matches[0][1] == 0
    assert starts > 0, "first frames of episodes are never trained on"


def test_batches_depend_on_the_seed_and_not_on_prefetch(batches):
    (a, _), (b, _), (c, _) = batches(prefetch=0), batches(prefetch=3), batches(seed=1)
    first = [next(a) for _ in range(a.steps_per_epoch + 2)]
    assert all(equal(x, next(b)) for x in first)
    assert not all(equal(x, next(c)) for x in first[:3])
    assert not equal(first[0], first[a.steps_per_epoch]), "the second epoch repeats the first"


@pytest.mark.parametrize("taken", [0, 1, 5, 40])
def test_resume_gives_the_next_batch(batches, taken):
    train, _ = batches()
    for _ in itertools.islice(train, taken):
        pass
    state = train.state_dict()
    assert (state["consumed"], train.epoch) == (taken, taken // train.steps_per_epoch)
    expected = [next(train) for _ in range(4)]
    other, _ = batches()
    next(other)
    other.load_state_dict(state)
    assert all(equal(x, next(other)) for x in expected)


def test_resume_with_other_data_is_refused(batches):
    state = batches()[0].state_dict()
    with pytest.raises(DataError, match="cannot resume: the checkpoint's data have batch_size 4, these have 3"):
        batches(batch_size=3)[0].load_state_dict(state)


def test_split_is_by_episode_and_seeded(batches):
    config = dataclasses.replace(SMALL, split_seed=3)
    parts = ("training", "validation", "test")
    splits = [[each.episodes for each in make_batches(c, 0, parts=parts)] for c in (SMALL, SMALL, config)]
    train, validation, test = splits[0]
    assert sorted(train + validation + test) == list(range(6))
    assert (len(validation), len(test)) == (2, 1)
    assert splits[0] == splits[1] != splits[2]


def test_a_run_takes_its_very_episodes_from_grown_data(batches):
    (first, _) = batches()
    (grown, _) = make_batches(dataclasses.replace(SMALL, episodes=9), 0, split=first.split)
    assert [grown.episodes, grown.split] == [first.episodes, first.split]
    assert equal(next(grown), next(first))
    grown.close()
    with pytest.raises(DataError, match="episodes that this run was split into are missing"):
        make_batches(dataclasses.replace(SMALL, episodes=3), 0, split=first.split)


def test_a_limited_pass_is_spread_over_all_episodes(batches):
    validation = batches(episodes=30)[1]
    few = torch.cat([batch["action"] for batch in validation.one_pass(limit=3)])
    everything = torch.cat([batch["action"] for batch in validation.one_pass()])
    assert len(few) == 3 * SMALL.batch_size
    places = [(everything == sequence).flatten(1).all(1).nonzero()[0].item() for sequence in few]
    assert places == sorted(places)
    assert {place // 14 for place in places} == set(range(len(validation.episodes)))  # 14 sequences an episode


def test_one_pass_is_finite_in_order_and_does_not_advance_the_iterator(batches):
    _, validation = batches()
    next(validation)
    before = validation.state_dict()
    sequences = torch.cat(list(validation.one_pass()))
    assert validation.state_dict() == before
    expected = torch.cat([validation.episode(i)[:98].reshape(14, 7) for i in range(2)])
    assert equal(sequences, expected)


def test_mean_frame(batches):
    train, _ = batches()
    frames = torch.cat([train.episode(i)["pixels"] for i in range(len(train.episodes))])
    mean = train.mean_frame()
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, normalise(frames).mean(0))


def test_an_error_in_the_thread_reaches_the_consumer_and_threads_end(batches, monkeypatch):
    train, _ = batches()
    next(train)
    train.load_state_dict(train.state_dict())
    monkeypatch.setattr(train._windows, "batch", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(train)
    train.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(train)
    unclosed = SequenceBatches(SyntheticEpisodes(2, 8, 0), [0, 1], sequence_length=5, batch_size=2, seed=0)
    next(unclosed)
    del unclosed
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": None}, "--data is not given"),
        ({"data": "/nowhere.h5"}, "/nowhere.h5: there is no such file"),
        ({"episodes": 2}, "expected at least 3"),
        ({"sequence_length": 101}, "synthetic episodes have 100 frames"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0"),
    ],
)
def test_unusable_settings(changed, message):
    with pytest.raises(UserError, match=message):
        make_batches(dataclasses.replace(SMALL, **changed), 0)


def test_recorded_files_feed_batches_and_are_checked(shard):
    path = shard((30, 40, 50))
    config = dataclasses.replace(SMALL, data=str(path), image_size=8)
    train, validation = make_batches(config, 0)
    assert (train.action_dim, train.image_size) == (2, 8)
    assert next(train)["pixels"].shape == (4, 7, 3, 8, 8)
    train.close(), validation.close()
    with pytest.raises(DataError, match="'task' is swingup, expected balance; pass --task swingup"):
        make_batches(dataclasses.replace(config, task="balance"), 0)


def test_synthetic_episodes_depend_on_the_actions_and_the_seed():
    first, again = (SyntheticEpisodes(2, 32, seed=3).read_episode(1) for _ in range(2))
    assert equal(first, again)
    assert not equal(first, SyntheticEpisodes(2, 32, seed=4).read_episode(1))
    # Only the disc is mostly red: its path accelerates in the direction of the actions.
    red = (first["pixels"][:, 0].float() - 150).clamp(min=0)
    axis = torch.linspace(-1, 1, 32)
    centre = torch.stack([(red.sum(1) @ axis), (red.sum(2) @ axis)], 1) / red.sum((1, 2))[:, None]
    acceleration = centre[2:] - 1.8 * centre[1:-1] + 0.8 * centre[:-2]
    free = torch.stack([(centre[i : i + 98].abs() < 0.7).all(1) for i in range(3)]).all(0)  # no wall touched
    correlation = torch.corrcoef(torch.stack([acceleration[free].flatten(), first["action"][1:-1][free].flatten()]))[0, 1]
    assert correlation > 0.95
