"""Diagnosis of stalled runs, given the statuses of the ranks."""

import re
import threading
import time

import pytest

from craft_ds.distributed.collectives import fail_together
from craft_ds.distributed.diagnosis import (
    Place,
    RankStatus,
    hanging_ranks,
    name_ranks,
    place_of,
    silent_ranks,
)

GONE = RankStatus(moved=False)
LEFT = RankStatus(moved=False, closed=True)


def alive(where="craft_ds/training/run.py:1 in f", waits=False, collectives=None):
    return RankStatus(moved=True, place=Place(where, waits, collectives))


def waiting(collectives=None):
    return alive("distributed/distributed_c10d.py:9 in all_reduce", True, collectives)


def test_a_stopped_heartbeat_is_reported():
    diagnosis = silent_ranks([alive(), GONE, alive()], 6.0)
    assert diagnosis.ranks == (1,)
    assert diagnosis.line == (
        "rank 1 has stopped or its machine is gone: no heartbeat for 6 s; "
        "resume from the last checkpoint (--resume=true)"
    )


def test_several_silent_ranks_are_reported_together():
    diagnosis = silent_ranks([GONE, alive(), GONE], 6.0)
    assert diagnosis.ranks == (0, 2)
    assert diagnosis.line.startswith("ranks 0, 2 have stopped or their machines are gone: no heartbeat")


def test_ranks_are_named_with_their_hosts_if_there_are_several():
    hosts = ["a", "a", "b", "b", "c"]
    assert name_ranks([1, 2, 3], hosts) == "rank 1 on a, ranks 2, 3 on b"
    assert name_ranks([1, 2], ["a"] * 3) == "ranks 1, 2"
    diagnosis = silent_ranks([alive(), alive(), GONE, GONE, alive()], 6.0, hosts)
    assert diagnosis.line.startswith("ranks 2, 3 on b have stopped or their machines are gone: ")
    line = hanging_ranks([waiting(), alive(), waiting(), waiting(), waiting()], 600.0, hosts).line
    assert line.startswith("rank 1 on a hangs in ")
    line = hanging_ranks([alive(), alive(), alive()], 600.0, hosts[1:4]).line
    assert "(rank 0 on a is in craft_ds/training/run.py:1 in f; rank 1 on b is in " in line


def test_an_exited_rank_is_not_reported_as_silent():
    assert silent_ranks([alive(), LEFT, alive()], 6.0) is None


@pytest.mark.parametrize("late", range(3))
def test_a_rank_outside_a_collective_is_reported(late):
    statuses = [waiting() for _ in range(3)]
    statuses[late] = alive("data/dataset.py:123 in __getitem__")
    diagnosis = hanging_ranks(statuses, 600.0)
    assert diagnosis.ranks == (late,)
    assert diagnosis.line == (
        f"rank {late} hangs in data/dataset.py:123 in __getitem__ while the others wait for it: "
        "no progress for 600 s; resume from the last checkpoint (--resume=true), or raise --rank_timeout "
        "if a step may take that long"
    )


def test_the_rank_with_the_fewest_collectives_is_reported():
    statuses = [
        alive(collectives=12),
        alive("data/dataset.py:123 in get", collectives=9),
        alive(collectives=13),
    ]
    diagnosis = hanging_ranks(statuses, 600.0)
    assert diagnosis.ranks == (1,)
    assert "rank 1 hangs in data/dataset.py:123 in get while" in diagnosis.line


def test_a_rank_in_an_earlier_collective_is_reported():
    assert hanging_ranks([waiting(8), waiting(7), waiting(8)], 600.0).ranks == (1,)


def test_equal_collective_counts_report_no_rank():
    assert hanging_ranks([waiting(7), alive(collectives=7), waiting(7)], 600.0).ranks == ()


def test_counts_unknown_on_one_rank_are_ignored():
    assert hanging_ranks([waiting(8), waiting(7), alive(collectives=None)], 600.0).ranks == (2,)


def test_several_late_ranks_are_reported_with_positions():
    diagnosis = hanging_ranks([waiting(), alive("a.py:1 in f"), alive("b.py:2 in g")], 600.0)
    assert diagnosis.ranks == (1, 2)
    assert diagnosis.line.startswith(
        "ranks 1, 2 hang while the others wait for them (rank 1 in a.py:1 in f; rank 2 in b.py:2 in g): "
    )


@pytest.mark.parametrize("status", [waiting(7), alive(collectives=7)])
def test_no_rank_is_reported_if_all_are_equal(status):
    diagnosis = hanging_ranks([status] * 6, 600.0)
    assert diagnosis.ranks == ()
    assert diagnosis.line.startswith("all ranks hang, and none is behind the others (rank 0 is in ")
    assert "rank 3 is in" in diagnosis.line
    assert "rank 4 is in" not in diagnosis.line


def test_an_exited_rank_does_not_hang():
    assert hanging_ranks([LEFT, waiting(), waiting()], 600.0).ranks == ()


def test_a_rank_without_a_position_is_named():
    diagnosis = hanging_ranks([waiting(), RankStatus(moved=True), waiting()], 600.0)
    assert "; rank 1 did not report where)" in diagnosis.line


def place_while(wait, **given):
    """Return the position of a thread in `wait(inside, leave)`, which loops until `leave`."""
    entered, leave = threading.Event(), []
    thread = threading.Thread(target=wait, args=(entered.set, leave))
    thread.start()
    assert entered.wait(10)
    time.sleep(0.1)
    place = place_of(thread.ident, **given)
    leave.append(True)
    thread.join()
    return place


def spin(inside, leave):
    inside()
    while not leave:
        pass


def test_a_position_is_the_innermost_frame():
    place = place_while(spin, collectives=4)
    assert re.fullmatch(r"distributed/test_diagnosis.py:\d+ in spin", place.where)
    assert not place.waits
    assert place.collectives == 4


def test_the_calling_frame_of_the_package_is_named_too():
    place = place_while(lambda inside, leave: fail_together(spin)(inside, leave), collectives=None)
    assert ", called from craft_ds/distributed/collectives.py:" in place.where
    assert place.where.endswith(" in collective")


@pytest.mark.parametrize(
    ("file", "function", "waits"),
    [
        ("/site-packages/torch/distributed/distributed_c10d.py", "all_reduce", True),
        ("/site-packages/deepspeed/comm/torch.py", "all_reduce", True),
        ("/site-packages/deepspeed/runtime/zero/partition_parameters.py", "wait", True),
        ("/site-packages/deepspeed/runtime/engine.py", "forward", False),
        ("/site-packages/torch/nn/modules/linear.py", "forward", False),
    ],
)
def test_which_frames_are_inside_a_collective(file, function, waits):
    namespace = {}
    source = f"def {function}(inside, leave):\n    inside()\n    while not leave: pass\n"
    exec(compile(source, file, "exec"), namespace)
    assert place_while(namespace[function], collectives=None).waits is waits


def test_a_finished_thread_has_a_position():
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert place_of(thread.ident, None).where == "a thread that has ended"
