"""The harness itself: a kill strikes where it is aimed, a hang ends, and a failure reaches the table."""

import json
import signal

import pytest
from fault_table import FaultTable
from ranks import Kill, Saboteur

KILLED = -signal.SIGKILL
HANG = Saboteur("probes:hang", {})


def test_the_server_has_nothing_that_must_not_be_forked(fork_server):
    assert fork_server.hello["unforkable"] == []


def test_a_rank_that_hangs_shows_where(fork_server):
    ended = fork_server.run([], 1, saboteurs={0: [HANG]}, timeout=1.0)
    assert ended.statuses == [1]
    assert "in hang" in ended.outputs[0]


def test_a_rank_that_fails_ends_the_others_after_the_grace(fork_server):
    saboteurs = {0: [HANG], 1: [Saboteur("probes:leave", {"status": 3})]}
    ended = fork_server.run([], 2, saboteurs=saboteurs, grace=0.2)
    assert (ended.statuses, ended.helped) == ([KILLED, 3], [0])


def test_a_kill_comes_at_its_time_and_to_its_ranks(fork_server):
    saboteurs = {0: [Saboteur("probes:leave", {"status": 0})], 1: [HANG]}
    ended = fork_server.run([], 2, saboteurs=saboteurs, kill=Kill(0.5, (0, 1)))
    assert (ended.statuses, ended.helped) == ([0, KILLED], [])
    assert ended.killed
    assert 0.5 <= ended.seconds < 10.0


CALLS = [
    ("mkdir", "a"),
    ("open", "a/file"),
    ("pwrite", "a/file"),
    ("fsync", "a/file"),
    ("rename", "b"),
]


def strike(fork_server, tmp_path, kill):
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    saboteurs = [
        Saboteur("saboteurs:watch_changes", {"directory": str(run), "log": str(log), "kill": kill}),
        Saboteur("probes:change_files", {"directory": str(run)}),
    ]
    [status] = fork_server.run([], 1, saboteurs={0: saboteurs}).statuses
    seen = [json.loads(line) for line in log.read_text().splitlines()]
    return status, [(line["op"], line["path"]) for line in seen], run


def test_every_change_is_seen_in_order(fork_server, tmp_path):
    status, seen, _ = strike(fork_server, tmp_path, None)
    assert (status, seen) == (0, CALLS)


@pytest.mark.parametrize(("when", "left"), [("before", b""), ("middle", b"1234"), ("after", b"12345678")])
def test_a_rank_dies_at_the_chosen_call(fork_server, tmp_path, when, left):
    status, seen, run = strike(fork_server, tmp_path, {"call": 2, "when": when})
    assert (status, seen) == (KILLED, CALLS[:3])
    assert (run / "a" / "file").read_bytes() == left


def test_the_table_counts_what_held_and_names_what_failed():
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
