"""A loss or a gradient that is non-finite on one rank skips the step on all ranks."""

from registry import every
from test_checkpoint_of_ranks import assert_same, renamed
from test_parity import assert_close_overall

NON_FINITE = ("task", "retention: task", "retention: anchors", "retention: constraint")


@every("non_finite")
def test_no_rank_takes_the_step(ranks, name):
    for seen in ranks[name].values:
        assert {case: seen[case][0] for case in NON_FINITE} == dict.fromkeys(NON_FINITE, False)
        assert not seen["task"][1]
        assert seen["sound"] == [True, True]


@every("non_finite")
def test_it_changes_nothing(ranks, name):
    assert_same(renamed(ranks[name], "skipped"), renamed(ranks[name], "before"))


@every("non_finite")
def test_the_next_steps_are_those_of_a_run_that_never_met_it(ranks, name, reference):
    after = renamed(ranks[name], "after")
    assert_close_overall(after, renamed(reference["non_finite"], "after"))
    before = renamed(ranks[name], "before")
    assert any(not after[key].equal(tensor) for key, tensor in before.items())
