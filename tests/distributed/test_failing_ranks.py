"""If a rank fails, the others fail too; no rank waits forever."""

import sys
import time

from registry import every

from craft_ds.testing.launch_ranks import run_ranks


@every("failing_rank")
def test_bad_input_on_one_rank_is_the_same_error_on_all(ranks, name):
    for received in ranks[name].values:
        assert received["bad_input"] == ["UserError", "no such file"]


@every("failing_rank")
def test_any_other_error_on_one_rank_fails_all(ranks, name):
    *others, failing = ranks[name].values
    assert failing["bug"] == ["KeyError", "'weight'"]
    for received in others:
        assert received["bug"] == ["RuntimeError", f"rank {ranks.world_size - 1} failed: KeyError: 'weight'"]


@every("failing_rank")
def test_an_error_of_the_main_rank_alone_fails_all(ranks, name):
    main, *others = ranks[name].values
    assert main["full_disk"] == ["OSError", "no space left"]
    for received in others:
        assert received["full_disk"] == ["RuntimeError", "rank 0 failed: OSError: no space left"]


@every("failing_rank")
def test_the_ranks_are_in_step_afterwards(ranks, name):
    assert [received["after"] for received in ranks[name].values] == list(range(ranks.world_size))


WAITS = """
import faulthandler, os, signal, sys, time
faulthandler.register(signal.SIGUSR1)
if os.environ["RANK"] == os.environ.get("FAILING"):
    sys.exit(3)
def wait_for_the_others():
    time.sleep(60)
wait_for_the_others()
"""


def test_a_late_rank_shows_its_stack_and_is_ended():
    began = time.monotonic()
    ends = run_ranks([sys.executable, "-c", WAITS], 2, timeout=2)
    assert time.monotonic() - began < 20
    assert all(end.status < 0 and "in wait_for_the_others" in end.output for end in ends)


def test_ranks_do_not_outlive_one_that_failed():
    began = time.monotonic()
    ends = run_ranks([sys.executable, "-c", WAITS], 2, timeout=60, grace=1, environment={"FAILING": "1"})
    assert time.monotonic() - began < 20
    assert ends[1].status == 3
    assert ends[0].status < 0
