"""What the ranks of a run write for one another into the process group's store."""

import json
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

from craft_ds.distributed.diagnosis import Diagnosis, Place, RankStatus


class Heartbeat(NamedTuple):
    """What a rank hears at each of its heartbeats.

    Attributes:
        progress: Of all ranks together.
        asked: Whether somebody wants to know where everybody is.
        told: Why the run ends, in the words of the first rank that said so; None while it goes on.
        next_beat: The heartbeat of the next rank, the one that this rank keeps an eye on.
        host_closed: Whether the rank that hosts the store leaves of its own accord, and takes it along.
    """

    progress: int
    asked: bool
    told: Diagnosis | None
    next_beat: int
    host_closed: bool


class HeartbeatStore:
    """The store, through a connection of its own, since one that waits keeps its other users waiting.

    Any of its methods takes for ever where the host of the store hangs, whatever timeout the store has: they
    belong into a thread on which nobody depends. `check` comes before each `get`, which would wait.

    Args:
        rank: This rank.
        world_size: Number of ranks.
        run: A name that no other run on this store has had.
    """

    def __init__(self, rank: int, world_size: int, run: str):
        shared: Any = distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"peers/{run}", shared.clone())
        self._rank = rank
        self._world_size = world_size
        # An elastic launcher's agent hosts it; otherwise the first rank does, and takes it along.
        self.host_rank = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0

    def beat(self, progress: int) -> Heartbeat:
        """Show a sign of life, and hear the news.

        Args:
            progress: What this rank has done since its last beat.
        """
        self._store.add(f"beat/{self._rank}", 1)
        return Heartbeat(
            progress=self._store.add("progress", progress),
            asked=self._store.check(["asked"]),
            told=_verdict(self._read("told")),
            next_beat=self._store.add(f"beat/{(self._rank + 1) % self._world_size}", 0),
            host_closed=self.host_rank is not None and self._store.check([f"closed/{self.host_rank}"]),
        )

    def ask(self) -> None:
        """Want to know of every rank where it is."""
        self._store.set("asked", "1")

    def write_place(self, place: Place) -> None:
        """Say where this rank's main thread is."""
        self._store.set(f"place/{self._rank}", json.dumps(place))

    def beats(self) -> list[int]:
        """Every rank's heartbeats; 0 for one that has not begun."""
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self._world_size)]

    def statuses(self, before: list[int]) -> list[RankStatus]:
        """What is to be seen of every rank, compared with its heartbeats at an earlier moment."""
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
        """Say why the run ends, unless another rank has."""
        if self._store.add("tellers", 1) == 1:
            self._store.set("told", json.dumps(why))

    def claim(self) -> bool:
        """Whether this rank is the first of its machine to claim the right to speak."""
        return self._store.add(f"speakers/{socket.gethostname()}", 1) == 1

    def close(self) -> None:
        """Say that this rank leaves of its own accord, and will be missed by nobody."""
        self._store.set(f"closed/{self._rank}", "1")

    def all_closed(self, but: Sequence[int]) -> bool:
        """Whether every rank, but those given, has left of its own accord."""
        awaited = [rank for rank in range(self._world_size) if rank not in but]
        return self._store.check([f"closed/{rank}" for rank in awaited])

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None


def _place(said: Any) -> Place | None:
    return said and Place(*said)


def _verdict(said: Any) -> Diagnosis | None:
    return said and Diagnosis(said[0], tuple(said[1]))


def count_collectives() -> int | None:
    """Collectives that this rank has begun, over all its groups; None where torch does not tell."""
    try:
        groups: list[Any] = list(distributed_c10d._world.pg_map)
        return sum(
            group._get_backend(device)._get_sequence_number_for_group()
            for group in groups
            for device in group._device_types
        )
    except Exception:
        return None
