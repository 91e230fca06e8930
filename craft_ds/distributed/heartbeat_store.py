"""Heartbeats and messages that the ranks of a run exchange through the process group's store."""

import json
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

from craft_ds.distributed.diagnosis import Diagnosis, Place, RankStatus
from craft_ds.distributed.rendezvous import agent_hosts_store


class Heartbeat(NamedTuple):
    """What a rank reads at each of its heartbeats.

    Attributes:
        progress: Progress counter, summed over all ranks.
        asked: True if a rank has asked all ranks for their positions.
        told: Why the run ends, from the first rank that reported it; None while it continues.
        next_beat: The heartbeat of the next rank, which this rank watches.
        host_closed: True if the rank that hosts the store exits on its own, which ends the store.
    """

    progress: int
    asked: bool
    told: Diagnosis | None
    next_beat: int
    host_closed: bool


class HeartbeatStore:
    """The store over a separate connection: a call that waits blocks all users of its connection.

    Every method blocks forever if the host of the store hangs, whatever the store's timeout: call them only
    from a thread that nothing else depends on. Each `get`, which would wait, is preceded by `check`.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        run: A name that no other run uses on this store.
    """

    def __init__(self, rank: int, world_size: int, run: str):
        shared: Any = distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"watchdog/{run}", shared.clone())
        self._rank = rank
        self._world_size = world_size
        # An elastic launcher's agent hosts the store; otherwise rank 0 does, and the store ends with it.
        self.host_rank = None if agent_hosts_store() else 0

    def beat(self, progress: int) -> Heartbeat:
        """Publish a heartbeat and read the others' messages.

        Args:
            progress: This rank's progress since its last heartbeat.
        """
        self._store.add(f"beat/{self._rank}", 1)
        return Heartbeat(
            progress=self._store.add("progress", progress),
            asked=self._store.check(["asked"]),
            told=_diagnosis(self._read("told")),
            next_beat=self._store.add(f"beat/{(self._rank + 1) % self._world_size}", 0),
            host_closed=self.host_rank is not None and self._store.check([f"closed/{self.host_rank}"]),
        )

    def ask(self) -> None:
        """Ask every rank for its position."""
        self._store.set("asked", "1")

    def write_place(self, place: Place) -> None:
        """Publish the position of this rank's main thread."""
        self._store.set(f"place/{self._rank}", json.dumps(place))

    def beats(self) -> list[int]:
        """Return every rank's heartbeat count; 0 for a rank that has not started."""
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._world_size)]

    def statuses(self, before: list[int]) -> list[RankStatus]:
        """Return every rank's status, given its heartbeat count at an earlier moment."""
        statuses = []
        for rank, (beats, earlier) in enumerate(zip(self.beats(), before, strict=True)):
            statuses.append(
                RankStatus(
                    moved=beats != earlier or rank == self._rank,
                    closed=self._store.check([f"closed/{rank}"]),
                    place=_place(self._read(f"place/{rank}")),
                )
            )
        return statuses

    def tell(self, why: Diagnosis) -> None:
        """Publish why the run ends, unless another rank already has."""
        if self._store.add("tellers", 1) == 1:
            self._store.set("told", json.dumps(why))

    def claim(self) -> bool:
        """Return True for the first rank of each machine that calls this: it prints the message."""
        return self._store.add(f"speakers/{socket.gethostname()}", 1) == 1

    def close(self) -> None:
        """Publish that this rank exits on its own, so that the others do not report it."""
        self._store.set(f"closed/{self._rank}", "1")

    def all_closed(self, but: Sequence[int]) -> bool:
        """Return True if every rank except those given has exited on its own."""
        awaited = [rank for rank in range(self._world_size) if rank not in but]
        return self._store.check([f"closed/{rank}" for rank in awaited])

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def _place(said: Any) -> Place | None:
    return said and Place(*said)


def _diagnosis(said: Any) -> Diagnosis | None:
    return said and Diagnosis(said[0], tuple(said[1]))


def count_collectives() -> int | None:
    """Return the number of collectives this rank has started in all groups; None if torch does not report it.

    Uses private names of torch: where they are missing, diagnosis continues without the counts.
    """
    try:
        groups: list[Any] = list(distributed_c10d._world.pg_map)
        return sum(
            group._get_backend(device)._get_sequence_number_for_group()
            for group in groups
            for device in group._device_types
        )
    except Exception:
        return None
