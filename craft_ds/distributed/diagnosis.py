"""Which rank the others wait for: a verdict from what the ranks show of themselves. Touches no store."""

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
    """Where a rank's main thread is.

    Attributes:
        where: The innermost frame, ``file:line in function``, and the one of this package that led there.
        waits: Whether that frame belongs to what the ranks do together.
        collectives: How many collectives the rank has begun; None where torch does not tell.
    """

    where: str
    waits: bool
    collectives: int | None


class RankStatus(NamedTuple):
    """One rank, as its heartbeat at two moments shows it.

    Attributes:
        moved: Whether its heartbeat went on between them.
        closed: Whether it has left of its own accord.
        place: What it said of its main thread; None if nothing.
    """

    moved: bool
    closed: bool = False
    place: Place | None = None


class Diagnosis(NamedTuple):
    """A line without line breaks that says what is the matter and the mend, and the ranks that it blames."""

    line: str
    ranks: tuple[int, ...]


def place_of(thread: int, collectives: int | None) -> Place:
    """The place of a thread of this process.

    Args:
        thread: Its identifier.
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
    """DeepSpeed waits for what it began earlier outside its communication modules, in functions `wait`."""
    file = frame.f_code.co_filename.replace("\\", "/")
    if "/torch/distributed/" in file or "/deepspeed/comm/" in file:
        return True
    return "/deepspeed/" in file and frame.f_code.co_name == "wait"


def silent_ranks(statuses: Sequence[RankStatus], watched: float) -> Diagnosis | None:
    """Blame the ranks without a sign of life.

    Args:
        statuses: One a rank, in rank order.
        watched: Seconds between the two moments.

    Returns:
        None where every rank lives or has left of its own accord.
    """
    silent = tuple(rank for rank, status in enumerate(statuses) if not (status.moved or status.closed))
    if not silent:
        return None
    stopped = "has stopped or its machine is" if len(silent) == 1 else "have stopped or their machines are"
    return Diagnosis(
        f"{_names(silent)} {stopped} gone: no sign of life for {watched:.0f} s; {RESUME}",
        silent,
    )


def hanging_ranks(statuses: Sequence[RankStatus], stalled: float) -> Diagnosis:
    """Blame the ranks that live, but do not come to where the others wait.

    All ranks begin the same collectives in the same order, so those that have begun fewest are awaited by the
    others. That holds on GPUs too, where a rank does not wait inside a collective, but later, wherever a
    result is read. Only where torch does not tell the counts, those outside a collective are blamed.

    Args:
        statuses: One a rank, in rank order; all are alive or have left.
        stalled: Seconds without progress.
    """
    places = {
        rank: status.place for rank, status in enumerate(statuses) if not status.closed and status.place
    }
    unheard = [rank for rank, status in enumerate(statuses) if not status.closed and not status.place]
    late = _late(places)
    mend = f"no progress for {stalled:.0f} s; {RESUME}, or raise --rank_timeout if a step may take that long"
    if late and len(late) < len(places):
        where = "; ".join(f"rank {rank} in {places[rank].where}" for rank in late[:_MOST_PLACES])
        if len(late) == 1:
            line = f"rank {late[0]} hangs in {places[late[0]].where} while the others wait for it: {mend}"
        else:
            line = f"{_names(late)} hang while the others wait for them ({where}): {mend}"
        return Diagnosis(line, late)
    where = "; ".join(f"rank {rank} is in {place.where}" for rank, place in [*places.items()][:_MOST_PLACES])
    if len(places) > _MOST_PLACES:
        where += "; …"
    if unheard:
        where += f"; {_names(unheard)} did not say where"
    return Diagnosis(f"all ranks hang, and none keeps the others waiting ({where}): {mend}", ())


def _late(places: dict[int, Place]) -> tuple[int, ...]:
    counts = [place.collectives for place in places.values() if place.collectives is not None]
    if len(counts) == len(places):
        return tuple(rank for rank, place in places.items() if place.collectives == min(counts))
    return tuple(rank for rank, place in places.items() if not place.waits)


def _names(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {numbers}" if len(ranks) == 1 else f"ranks {numbers}"
