"""Diagnosis of a stalled run: which rank the others wait for. Pure functions of the ranks' statuses."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

RESUME = "resume from the last checkpoint (--resume=true)"
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_MOST_PLACES = 4


class Place(NamedTuple):
    """Position of a rank's main thread.

    Attributes:
        where: The innermost frame as `file:line in function`, and the frame of this package that called it.
        waits: True if that frame is inside a collective.
        collectives: Number of collectives that the rank has started; None if torch does not report it.
    """

    where: str
    waits: bool
    collectives: int | None


class RankStatus(NamedTuple):
    """One rank as seen by comparing its heartbeat at two moments.

    Attributes:
        moved: True if its heartbeat advanced between them.
        closed: True if it has exited on its own.
        place: The reported position of its main thread; None if it reported nothing.
    """

    moved: bool
    closed: bool = False
    place: Place | None = None


class Diagnosis(NamedTuple):
    """One line that states the problem and the fix, and the ranks that caused it."""

    line: str
    ranks: tuple[int, ...]


def place_of(thread: int, collectives: int | None) -> Place:
    """Return the position of a thread of this process.

    Args:
        thread: The thread's identifier.
        collectives: See `Place`.
    """
    innermost = sys._current_frames().get(thread)
    if innermost is None:
        return Place("a thread that has ended", False, collectives)
    where = _describe(innermost)
    frame: FrameType | None = innermost
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is not None and frame is not innermost:
        where += f", called from {_describe(frame)}"
    return Place(where, _waits(innermost), collectives)


def _describe(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    in_package = frame.f_code.co_filename.startswith(_PACKAGE)
    name = str(path.relative_to(Path(_PACKAGE).parent)) if in_package else "/".join(path.parts[-2:])
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _waits(frame: FrameType) -> bool:
    """Return True inside a collective. DeepSpeed also waits in functions named `wait` of other modules."""
    file = frame.f_code.co_filename.replace("\\", "/")
    if "/torch/distributed/" in file or "/deepspeed/comm/" in file:
        return True
    return "/deepspeed/" in file and frame.f_code.co_name == "wait"


def silent_ranks(
    statuses: Sequence[RankStatus], watched: float, hosts: Sequence[str] = ()
) -> Diagnosis | None:
    """Report the ranks whose heartbeat has stopped.

    Args:
        statuses: One per rank, in rank order.
        watched: Seconds between the two observations.
        hosts: Host name of each rank, if there are several.

    Returns:
        None if every rank is alive or has exited on its own.
    """
    silent = tuple(rank for rank, status in enumerate(statuses) if not (status.moved or status.closed))
    if not silent:
        return None
    stopped = "has stopped or its machine is" if len(silent) == 1 else "have stopped or their machines are"
    return Diagnosis(
        f"{name_ranks(silent, hosts)} {stopped} gone: no heartbeat for {watched:.0f} s; {RESUME}",
        silent,
    )


def hanging_ranks(statuses: Sequence[RankStatus], stalled: float, hosts: Sequence[str] = ()) -> Diagnosis:
    """Report live ranks that have not reached the collective the others are waiting in.

    All ranks start the same collectives in the same order, so the others wait for those that have started
    fewest. This also holds on GPUs, where a rank does not wait inside a collective but later, when a result
    is read. If torch does not report the counts, the ranks outside a collective are reported instead.

    Args:
        statuses: One per rank, in rank order; all are alive or have exited.
        stalled: Seconds without progress.
        hosts: Host name of each rank, if there are several.
    """
    places = {
        rank: status.place for rank, status in enumerate(statuses) if not status.closed and status.place
    }
    unheard = [rank for rank, status in enumerate(statuses) if not status.closed and not status.place]
    late = _late(places)
    fix = f"no progress for {stalled:.0f} s; {RESUME}, or raise --rank_timeout if a step may take that long"
    if late and len(late) < len(places):
        where = "; ".join(f"rank {rank} in {places[rank].where}" for rank in late[:_MOST_PLACES])
        names = name_ranks(late, hosts)
        if len(late) == 1:
            line = f"{names} hangs in {places[late[0]].where} while the others wait for it: {fix}"
        else:
            line = f"{names} hang while the others wait for them ({where}): {fix}"
        return Diagnosis(line, late)
    where = "; ".join(
        f"{name_ranks([rank], hosts)} is in {place.where}" for rank, place in [*places.items()][:_MOST_PLACES]
    )
    if len(places) > _MOST_PLACES:
        where += "; …"
    if unheard:
        where += f"; {name_ranks(unheard, hosts)} did not report where"
    return Diagnosis(f"all ranks hang, and none is behind the others ({where}): {fix}", ())


def _late(places: dict[int, Place]) -> tuple[int, ...]:
    counts = [place.collectives for place in places.values() if place.collectives is not None]
    if len(counts) == len(places):
        return tuple(rank for rank, place in places.items() if place.collectives == min(counts))
    return tuple(rank for rank, place in places.items() if not place.waits)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """Return the names of ranks, such as `ranks 2, 3 on node1`; without the host if it is the only one.

    Args:
        ranks: The ranks, in order.
        hosts: Host name of each rank of the run; empty: one host.
    """
    if len(set(hosts)) > 1:
        by_host: dict[str, list[int]] = {}
        for rank in ranks:
            by_host.setdefault(hosts[rank], []).append(rank)
        shown = [f"{name_ranks(own)} on {host}" for host, own in by_host.items()]
        return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "")
    numbers = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"
