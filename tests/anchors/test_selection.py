from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.anchors.selection import allocate_evenly, select_anchors


def frames(lengths_by_task):
    """Task and episode of each frame of a data set whose episodes of the tasks follow one another."""
    task, episode = [], []
    number = 0
    for one_task, lengths in enumerate(lengths_by_task):
        for length in lengths:
            task += [one_task] * length
            episode += [number] * length
            number += 1
    return np.array(task), np.array(episode)


data_sets = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=4)


def test_equal_tasks_and_episodes_get_equal_shares():
    task, episode = frames([[20] * 3, [20] * 3])
    selection = select_anchors(task, episode, 24, 0.2, seed=0)
    assert Counter(task[selection.frames]) == {0: 12, 1: 12}
    assert set(Counter(episode[selection.frames]).values()) == {4}
    assert len(selection.heldout_episodes) == 2
    assert set(task[np.isin(episode, selection.heldout_episodes)]) == {0, 1}
    assert selection.heldout.sum() == 8


def test_a_short_task_gives_all_it_has():
    task, episode = frames([[3, 2], [50, 50]])
    selection = select_anchors(task, episode, 40, 0.0, seed=0)
    assert Counter(task[selection.frames]) == {0: 5, 1: 35}
    assert selection.heldout_episodes == []


@settings(max_examples=50, deadline=None)
@given(data_sets, st.floats(0, 1), st.floats(0, 0.9), st.integers(0, 100))
def test_selection_properties(lengths, part, fraction, seed):
    task, episode = frames(lengths)
    count = max(1, int(part * len(task)))
    selection = select_anchors(task, episode, count, fraction, seed)
    assert len(set(selection.frames.tolist())) == count
    again = select_anchors(task, episode, count, fraction, seed)
    assert again.frames.tolist() == selection.frames.tolist()
    assert np.array_equal(selection.task, task[selection.frames])
    assert again.heldout_episodes == selection.heldout_episodes
    assert np.array_equal(selection.heldout, np.isin(episode[selection.frames], selection.heldout_episodes))
    keys = list(
        zip(
            selection.heldout,
            task[selection.frames],
            episode[selection.frames],
            selection.frames,
            strict=True,
        )
    )
    assert keys == sorted(keys)
    for one_task, episodes in enumerate(lengths):
        heldout = set(episode[task == one_task]) & set(selection.heldout_episodes)
        assert len(heldout) < len(episodes)
        if fraction > 0 and len(episodes) > 1:
            assert heldout


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.floats(0, 1))
def test_spread_is_as_equal_as_the_capacities_permit(capacities, part):
    capacities = np.array(capacities)
    total = int(part * capacities.sum())
    shares = allocate_evenly(total, capacities, np.random.default_rng(0))
    assert shares.sum() == total
    assert (shares <= capacities).all()
    unfilled = shares[shares < capacities]
    assert not len(unfilled) or shares.max() - unfilled.min() <= 1
