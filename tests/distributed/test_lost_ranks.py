"""A rank that dies or hangs is named and the others exit in time; slow ranks are not reported."""

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from craft_ds.errors import LOST_RANK_STATUS
from craft_ds.testing.launch_ranks import run_ranks

TIMEOUT_S = 2.5
INTERVAL_S = 0.8
# What `RankWatchdog` promises, and the seconds that a busy machine takes to end a process.
OF_A_DEATH_S = 10 * INTERVAL_S + 4
OF_AN_UNSEEN_DEATH_S = 25 * INTERVAL_S + 4
OF_A_HANG_S = TIMEOUT_S + 10 * INTERVAL_S + 4

HOST_GONE = (
    "rank 0 has stopped or its machine is gone: the store that it hosts does not answer; "
    "resume from the last checkpoint (--resume=true)"
)


class Ended(NamedTuple):
    """Result of a run, and the seconds it took after the fault."""

    statuses: list[int]
    outputs: list[str]
    seconds: float
    directory: Path

    def named(self) -> list[str]:
        """Return the lines that name a rank, without the place of the stacks."""
        lines = re.findall(r"^error: (.*)$", "\n".join(self.outputs), re.MULTILINE)
        return [re.sub(r"; stacks of threads: \S+$", "", line) for line in lines]

    def stacks(self) -> dict[int, str]:
        """Return the stacks that ranks have written, by rank."""
        files = self.directory.glob("stacks_rank_*.txt")
        return {int(path.stem.rpartition("_")[2]): path.read_text() for path in files}


def run(
    happens: str,
    victim: int,
    world_size: int,
    *,
    timeout: float = TIMEOUT_S,
    interval: float = INTERVAL_S,
    grace: float = 10.0,
    hosts: str = "",
) -> Ended:
    script = Path(__file__).with_name("watchdog_ranks.py")
    directory = Path(tempfile.mkdtemp())
    command = [sys.executable, script, happens, victim, timeout, interval, directory]
    ends = run_ranks(
        [str(part) for part in command],
        world_size,
        timeout=120,
        grace=grace,
        environment={"HOSTS": hosts} if hosts else None,
    )
    ended = time.monotonic()
    outputs = [end.output for end in ends]
    print(*outputs, sep="\n---\n")
    began = re.search(r"^at ([\d.]+)$", outputs[victim], re.MULTILINE)
    seconds = ended - float(began[1]) if began else 0.0
    return Ended([end.status for end in ends], outputs, seconds, directory)


def test_a_killed_rank_is_named():
    ended = run("dies", 1, world_size=3)
    assert ended.statuses == [LOST_RANK_STATUS, -9, LOST_RANK_STATUS]
    [line] = ended.named()
    assert line.startswith("rank 1 has stopped or its machine is gone: no heartbeat for 2 s; resume from")
    assert ended.seconds < OF_A_DEATH_S


def test_a_killed_store_host_is_named_by_every_rank():
    ended = run("dies", 0, world_size=3)
    assert ended.statuses == [-9, LOST_RANK_STATUS, LOST_RANK_STATUS]
    assert ended.named() == 2 * [HOST_GONE]
    assert ended.seconds < OF_A_DEATH_S


def test_a_killed_rank_is_named_where_torch_raises_nothing():
    ended = run("dies unseen", 1, world_size=3, timeout=1000.0, grace=30.0)
    assert ended.statuses == [LOST_RANK_STATUS, -9, LOST_RANK_STATUS]
    [line] = ended.named()
    assert line.startswith("rank 1 has stopped or its machine is gone: no heartbeat for ")
    assert ended.seconds < OF_AN_UNSEEN_DEATH_S


def test_a_stopped_rank_is_named():
    ended = run("stops", 1, world_size=2, grace=0.0)
    assert ended.statuses == [LOST_RANK_STATUS, -9]
    [line] = ended.named()
    assert line.startswith("rank 1 has stopped or its machine is gone: no heartbeat for 3 s; resume from")
    assert ended.seconds < OF_A_HANG_S


def test_a_stopped_store_host_is_named():
    ended = run("stops", 0, world_size=2, grace=0.0)
    assert ended.statuses == [-9, LOST_RANK_STATUS]
    [line] = ended.named()
    assert line == HOST_GONE
    assert ended.seconds < OF_A_HANG_S


def test_a_hanging_rank_is_named_with_its_position():
    ended = run("sleeps", 1, world_size=3)
    assert ended.statuses == [LOST_RANK_STATUS] * 3
    [line] = ended.named()
    assert re.match(r"rank 1 hangs in distributed/watchdog_ranks\.py:\d+ in sleep_forever", line)
    assert " while the others wait for it: no progress for " in line
    assert "--rank_timeout" in line
    # The stacks of the one that is named, and of the one that prints, are in files.
    assert not any("most recent call first" in output for output in ended.outputs)
    assert f"; stacks of threads: {ended.directory}/stacks_rank_*.txt" in "".join(ended.outputs)
    stacks = ended.stacks()
    assert "in sleep_forever\n" in stacks.pop(1)
    assert len(stacks) == 1
    assert all("in add_numbers\n" in text for text in stacks.values())
    assert ended.seconds < OF_A_HANG_S


def test_lost_and_hanging_ranks_of_several_hosts_are_named_by_host():
    ended = run("dies", 2, world_size=3, hosts="alpha,beta,beta")
    assert {line.partition(": ")[0] for line in ended.named()} == {
        "rank 2 on beta has stopped or its machine is gone"
    }
    ended = run("dies", 0, world_size=3, hosts="alpha,beta,gamma")
    assert all(line.startswith("rank 0 on alpha has stopped or") for line in ended.named())
    assert ended.named()
    ended = run("sleeps", 1, world_size=3, hosts="alpha,beta,beta")
    assert all(line.startswith("rank 1 on beta hangs in distributed/watchdog") for line in ended.named())
    assert ended.named()
    ended = run("fails", 0, world_size=2, hosts="alpha,beta")
    assert ended.named() == ["rank 0 on alpha failed: KeyError: 'weight'"]


def test_a_hanging_store_host_waits_for_the_others():
    ended = run("sleeps", 0, world_size=2)
    assert ended.statuses == [LOST_RANK_STATUS] * 2
    [line] = ended.named()
    assert line.startswith("rank 0 hangs in ")
    assert ended.seconds < OF_A_HANG_S


def test_the_error_of_a_rank_reaches_the_others():
    ended = run("fails", 0, world_size=2)
    assert ended.statuses == [1, LOST_RANK_STATUS]
    assert ended.named() == ["rank 0 failed: KeyError: 'weight'"]
    assert "Traceback" in ended.outputs[0]
    assert "Traceback" not in ended.outputs[1]
    assert ended.seconds < OF_A_DEATH_S


def test_a_rank_that_exited_normally_is_not_named():
    ended = run("leaves", 1, world_size=2)
    assert ended.statuses[1] == 0
    assert ended.statuses[0] not in (0, LOST_RANK_STATUS)
    assert ended.named() == []
    assert re.search("RuntimeError: .*(closed|reset) by peer", ended.outputs[0])


def test_busy_or_suspended_ranks_are_not_reported():
    ended = run("slow", 1, world_size=3, timeout=5.0, interval=0.35)
    assert ended.statuses == [0, 0, 0]
    assert [output.split()[-1:] for output in ended.outputs] == [["finished"]] * 3
    assert ended.named() == []
