"""The split by content: disjoint, complete, the same whatever the order of files, and taken again exactly by a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aime_fast.data.split import check_disjoint, find_episodes, split_episodes
from aime_fast.errors import DataError

IDENTITIES = st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), min_size=3, max_size=40, unique=True)


@given(identities=IDENTITIES, seed=st.integers(0, 5), shares=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), order=st.randoms())
def test_every_episode_is_in_one_part_and_the_order_of_files_does_not_matter(identities, seed, shares, order):
    split = split_episodes(identities, *shares, seed)
    assert sorted(sum(split, ())) == sorted(identities)
    assert all(split)
    shuffled = list(identities) + identities[:1]  # a copy of an episode changes nothing
    order.shuffle(shuffled)
    assert split_episodes(shuffled, *shares, seed) == split


def test_another_seed_splits_otherwise():
    identities = [f"{i:04x}" for i in range(40)]
    assert split_episodes(identities, 0.1, 0.1, 0) != split_episodes(identities, 0.1, 0.1, 1)


def test_a_run_finds_its_episodes_among_others_or_says_what_is_missing():
    identities = [f"{i:04x}" for i in range(10)]
    split = split_episodes(identities, 0.2, 0.2, 0)
    grown = ["ffff", *reversed(identities), "eeee"]
    found = find_episodes(split.validation, grown, "grown.h5")
    assert tuple(grown[i] for i in found) == split.validation
    with pytest.raises(DataError, match=r"--data less.h5: 1 of 6 episodes .* are missing \(the first is"):
        find_episodes(split.training, [i for i in identities if i != split.training[2]], "less.h5")
    with pytest.raises(DataError, match="2 different episodes, expected at least 3"):
        split_episodes(["a", "b", "a"], 0.1, 0.1, 0)


def test_data_that_hold_training_episodes_are_refused():
    split = split_episodes([f"{i:04x}" for i in range(10)], 0.2, 0.2, 0)
    check_disjoint(["abcd", *split.validation, *split.test], split, "other.h5")
    with pytest.raises(DataError, match=r"--data other\.h5: 1 of its 2 episodes are training episodes"):
        check_disjoint(["abcd", split.training[0]], split, "other.h5")
