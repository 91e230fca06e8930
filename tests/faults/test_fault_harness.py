"""The harness itself: a kill happens at the chosen call, a hang ends, and a failure reaches the table."""

import json
import signal

import pytest
from fault_table import FaultTable
from launch import FaultInjector, Kill

KILLED = -signal.SIGKILL
HANG = FaultInjector("probes:hang", {})


def test_the_server_is_safe_to_fork(fork_server):
    assert fork_server.hello["unforkable"] == []


def test_a_hanging_rank_prints_its_stack(fork_server):
    ended = fork_server.run([], 1, injectors={0: [HANG]}, timeout=1.0)
    assert ended.statuses == [1]
    assert "in hang" in ended.outputs[0]


def test_other_ranks_are_killed_after_the_grace_period(fork_server):
    injectors = {0: [HANG], 1: [FaultInjector("probes:exit_with", {"status": 3})]}
    ended = fork_server.run([], 2, injectors=injectors, grace=0.2)
    assert (ended.statuses, ended.hung) == ([KILLED, 3], [0])


def test_a_kill_hits_its_ranks_at_its_time(fork_server):
    injectors = {0: [FaultInjector("probes:exit_with", {"status": 0})], 1: [HANG]}
    ended = fork_server.run([], 2, injectors=injectors, kill=Kill(0.5, (0, 1)))
    assert (ended.statuses, ended.hung) == ([0, KILLED], [])
    assert ended.killed
    assert 0.5 <= ended.seconds < 10.0


CALLS = [
    ("mkdir", "a"),
    ("open", "a/file"),
    ("pwrite", "a/file"),
    ("fsync", "a/file"),
    ("rename", "b"),
]


def run_watched(fork_server, tmp_path, kill):
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    injectors = [
        FaultInjector(
            "fault_injectors:watch_changes", {"directory": str(run), "log": str(log), "kill": kill}
        ),
        FaultInjector("probes:change_files", {"directory": str(run)}),
    ]
    [status] = fork_server.run([], 1, injectors={0: injectors}).statuses
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    return status, [(line["op"], line["path"]) for line in seen], run


def test_every_change_is_logged_in_order(fork_server, tmp_path):
    status, seen, _ = run_watched(fork_server, tmp_path, None)
    assert (status, seen) == (0, CALLS)


@pytest.mark.parametrize(("when", "left"), [("before", b""), ("middle", b"1234"), ("after", b"12345678")])
def test_a_rank_is_killed_at_the_chosen_call(fork_server, tmp_path, when, left):
    status, seen, run = run_watched(fork_server, tmp_path, {"call": 2, "when": when})
    assert (status, seen) == (KILLED, CALLS[:3])
    assert (run / "a" / "file").read_bytes() == left


def test_the_table_counts_passes_and_names_failures():
    table = FaultTable()
    table.record("damage", "manifest.json", "cut off", held=True)
    series = table.series("kill", "fsdp")
    for number in range(3):
        with series.case(f"case {number}") as details:
            details["seconds"] = 1.5
            assert number != 1, "lost"
    with pytest.raises(AssertionError, match=r"(?s)1 cases failed.*kill, fsdp: case 1.*lost"):
        series.check()
    assert table.rows() == [
        {"kind": "damage", "group": "manifest.json", "cases": 1, "held": 1},
        {"kind": "kill", "group": "fsdp", "cases": 3, "held": 2},
    ]
    assert "FAILED" in table.lines()[1]
    assert table.entries[2] == {
        "kind": "kill",
        "group": "fsdp",
        "name": "case 1",
        "held": False,
        "seconds": 1.5,
    }
