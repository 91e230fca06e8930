"""A rank that dies or hangs must not keep the others waiting: it is named, and they end.

Torch alone raises 'Connection closed by peer' on some of them, without a name, or waits for 30 minutes.
"""

import faulthandler
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Self

import torch.distributed as dist

from craft_ds.distributed.collectives import gather_objects
from craft_ds.distributed.diagnosis import (
    RESUME,
    Diagnosis,
    RankStatus,
    hanging_ranks,
    place_of,
    silent_ranks,
)
from craft_ds.distributed.env import is_local_rank0
from craft_ds.distributed.heartbeat_store import Heartbeat, HeartbeatStore, count_collectives
from craft_ds.errors import LOST_RANK_STATUS, RankLost, one_line

# The last is what a launcher brings about that ends all processes after one has died.
_OF_OTHERS = re.compile(
    r"gloo|nccl|c10d|Connection (closed|reset|refused)|Broken pipe|killed by signal: Terminated",
    re.IGNORECASE,
)


class RankWatchdog:
    """What a rank shows the others of itself, and what it knows of them. Does nothing in a run of one rank.

    Two threads: one writes a heartbeat to the store every `interval` seconds and hears what the others have
    to say; the other never touches the store, which may hang with its host, and watches the clock. When no
    rank has made progress for `timeout` seconds, every rank says where its main thread is and, within 10
    intervals, ends its process with status `LOST_RANK_STATUS`, even while the main thread is inside C++
    or CUDA; one rank of each machine says on stderr which rank is to blame. 14 intervals after the timeout
    a rank ends whatever happens. It ends as well if it is still there 10 intervals after another one has left
    with an error.

    Not every wait ends with an error when another rank dies: a new process group waits for its address, NCCL
    for its memory. So each rank keeps an eye on the next one, and when that has shown no heartbeat for 10
    intervals, all are looked at and the silent are named: within 15 intervals. Time during which the process
    itself is stopped counts for nothing.

    No clock is compared with another machine's, and the main thread only counts.

    Opening is collective: call on all ranks, from the thread that trains.

    Args:
        timeout: Seconds without progress on any rank after which the ranks end. They count from the first
            `progress` on, so that what is built before the first step may take as long as it likes.
        interval: Seconds between heartbeats.
    """

    def __init__(self, timeout: float, interval: float = 3.0):
        self._timeout = timeout
        self._interval = interval
        self._progress = 0
        self._unanswered = False
        self._missing: tuple[int, ...] = ()
        self._speaker: bool | None = None
        self._judging = threading.Lock()
        self._leaving = threading.Event()
        self._threads: list[threading.Thread] = []
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._alone:
            return
        self._main = threading.get_ident()
        self._rank = dist.get_rank()
        # Several runs of one process share a store, and so do the attempts of an elastic launcher.
        run = gather_objects(secrets.token_hex(8))[0]
        self._board = HeartbeatStore(self._rank, dist.get_world_size(), run)
        self._news = Heartbeat(0, False, None, 0, False)
        self._questions: queue.Queue[tuple[Callable[[], Any], Future] | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=target, name=f"peers-{target.__name__.strip('_')}", daemon=True)
            for target in (self._talk, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Say goodbye; where another rank is behind an error, raise `RankLost` in its place."""
        lost = self.explain(error) if error is not None else None
        self.close(lost or error)
        if lost is not None:
            raise lost from error

    def progress(self) -> None:
        """Note that the main thread gets on: a step, a batch, a piece of a file is done."""
        self._progress += 1

    def explain(self, error: BaseException) -> RankLost | None:
        """Find the rank that is behind an error of a collective on this one. Never raises.

        Looks at the heartbeats twice, over two intervals, and names those that stand still. That takes 3
        intervals, and 2 more where the host of the store hangs.

        Returns:
            What to raise in the error's place; None where it is this rank's own error, or no rank is silent.
        """
        if self._alone or self._leaving.is_set() or not _may_come_from_others(error):
            return None
        # The watch may be about to end the process with a verdict of its own; it gives none from now on.
        if not self._judging.acquire(timeout=14 * self._interval):
            return None
        try:
            diagnosis = self._silent()
        except Exception:
            diagnosis = self._without_store()
        if diagnosis is None:
            self._judging.release()
            return None
        self._tell(diagnosis)
        return RankLost(diagnosis.line, speaks=self._speaks())

    def close(self, error: BaseException | None = None) -> None:
        """Say goodbye, so that nobody misses this rank, and end the threads. Calling it again does nothing.

        The rank that hosts the store stays until the others have left too, for 4 intervals at most: they hear
        in that time why it leaves.

        Args:
            error: Why this rank leaves before the end. The others hear it, unless they know why already.
        """
        if self._alone or self._leaving.is_set():
            return
        if error is not None:
            line = f"rank {self._rank} failed: {type(error).__name__}: {one_line(error)}"
            self._tell(Diagnosis(line, (self._rank,)))
        self._announce_exit()
        self._leaving.set()
        self._questions.put(None)
        for thread in self._threads:
            thread.join(self._interval)

    # The thread that talks.

    def _talk(self) -> None:
        reported = 0
        while True:
            question = None
            try:
                question = self._questions.get(timeout=self._interval)
                if question is None:
                    return
            except queue.Empty:
                pass
            try:
                heard, done = self._news.told, self._progress
                self._news = self._board.beat(done - reported)
                reported = done
                if self._news.asked:
                    self._board.write_place(place_of(self._main, count_collectives()))
                # Before the store may go: who is to repeat what was told? The main rank has the first chance.
                if (
                    self._news.told
                    and self._rank not in self._news.told.ranks
                    and (heard or is_local_rank0())
                ):
                    self._claim()
                if question is not None:
                    question[1].set_result(question[0]())
                settled = self._news.told is None or self._speaker is not None
                if self._news.host_closed and settled and self._rank != self._board.host_rank:
                    return
            except Exception as error:  # the store is gone: it does not come back
                if question is not None:
                    question[1].set_exception(error)
                return

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Put a question to the store. Takes two intervals at most.

        Raises:
            Exception: The store is gone, or its host hangs.
        """
        if self._unanswered or not self._threads[0].is_alive():
            raise ConnectionError("the store does not answer")
        answer: Future = Future()
        self._questions.put((question, answer))
        try:
            return answer.result(timeout=2 * self._interval)
        except TimeoutError:
            self._unanswered = True
            raise

    def _try(self, question: Callable[[], Any]) -> Any:
        try:
            return self._ask(question)
        except Exception:
            return None

    # The thread that watches.

    def _watch(self) -> None:
        seen, beat = (0, 0), 0
        stalled = overdue = silent = 0.0
        before = time.monotonic()
        while not self._leaving.wait(self._interval / 2):
            now = time.monotonic()
            # A process that was stopped, alone or with its machine, has not been waiting all the while.
            passed = min(now - before, self._interval)
            before = now
            news = self._news
            done = (self._progress, news.progress)
            stalled = stalled + passed if done == seen and self._progress else 0.0
            overdue = overdue + passed if news.told else 0.0
            # Nor does the beat move where the store no longer answers.
            silent = silent + passed if news.next_beat == beat else 0.0
            seen, beat = done, news.next_beat
            late = stalled >= self._timeout or overdue >= 10 * self._interval
            if (late or silent >= 10 * self._interval) and self._judging.acquire(blocking=False):
                self._judge(stalled if late else None)
                self._judging.release()
                stalled = silent = 0.0

    def _judge(self, stalled: float | None) -> None:
        """End the process, unless all ranks live and one gets on after all.

        Args:
            stalled: Seconds without progress; None: it is only a heartbeat that is missed.
        """
        last_resort = threading.Timer(14 * self._interval, os._exit, (LOST_RANK_STATUS,))
        last_resort.daemon = True
        last_resort.start()
        try:
            diagnosis = self._silent() if stalled is None else self._hanging(stalled)
        except Exception:
            diagnosis = self._without_store(stalled)
        if diagnosis is None:
            last_resort.cancel()
            return
        try:
            self._tell(diagnosis)
            speaks = self._speaks()
            if speaks or self._rank in diagnosis.ranks:
                faulthandler.dump_traceback(file=2)
            if speaks:
                # Not by sys.stderr: the main thread may hang with its lock.
                os.write(2, f"error: {diagnosis.line}\n".encode())
            self._announce_exit()
        finally:
            os._exit(LOST_RANK_STATUS)

    # Verdicts.

    def _silent(self) -> Diagnosis | None:
        return self._news.told or self._compare(intervals=2)[0]

    def _hanging(self, stalled: float) -> Diagnosis | None:
        if self._news.told:
            return self._news.told
        self._ask(self._board.ask)
        done = (self._progress, self._news.progress)
        diagnosis, statuses = self._compare(intervals=4)
        if diagnosis or self._leaving.is_set():
            return diagnosis
        if done != (self._progress, self._news.progress):
            return None
        return hanging_ranks(statuses, stalled)

    def _compare(self, intervals: int) -> tuple[Diagnosis | None, list[RankStatus]]:
        """Look at the others at two moments. What one of them tells meanwhile is the verdict."""
        before = self._ask(self._board.beats)
        for _ in range(2 * intervals):
            if self._news.told or self._leaving.wait(self._interval / 2):
                return self._news.told, []
        statuses = self._ask(lambda: self._board.statuses(before))
        if self._news.told:
            return self._news.told, statuses
        diagnosis = silent_ranks(statuses, intervals * self._interval)
        self._missing = diagnosis.ranks if diagnosis else ()
        return diagnosis, statuses

    def _without_store(self, stalled: float | None = None) -> Diagnosis | None:
        """Blame the host of the store, unless it has said what is the matter or has left in good order."""
        if self._news.told:
            return self._news.told
        if self._news.host_closed:
            if stalled is None:
                return None
            where = place_of(self._main, None).where
            return Diagnosis(
                f"rank {self._rank} hangs in {where} for {stalled:.0f} s; {RESUME}", (self._rank,)
            )
        if self._board.host_rank is None:
            line = "the launcher's agent on the machine of rank 0 has stopped or the machine is gone"
            return Diagnosis(f"{line}: the store that it hosts does not answer; {RESUME}", ())
        host = self._board.host_rank
        line = f"rank {host} has stopped or its machine is gone: the store that it hosts does not answer"
        return Diagnosis(f"{line}; {RESUME}", (host,))

    # Words to the others and to the user.

    def _tell(self, why: Diagnosis) -> None:
        self._try(lambda: self._board.tell(why))

    def _claim(self) -> None:
        """On the thread that talks."""
        if self._speaker is None:
            self._speaker = self._board.claim()

    def _speaks(self) -> bool:
        """Whether this rank is the one of its machine to speak: the main one, if it does so in time."""
        if not is_local_rank0():
            self._leaving.wait(self._interval)
        if self._speaker is None:
            self._try(self._claim)
        return self._speaker is not False

    def _announce_exit(self) -> None:
        self._try(self._board.close)
        deadline = time.monotonic() + 4 * self._interval
        while self._board.host_rank == self._rank and time.monotonic() < deadline:
            if self._try(lambda: self._board.all_closed(but=self._missing)):
                return
            time.sleep(0.05)


def group_timeout(rank_timeout: float) -> timedelta:
    """The process group's own timeout: torch's for gloo, and longer than `RankWatchdog` take to speak."""
    return max(timedelta(minutes=30), timedelta(seconds=2 * rank_timeout))


def _may_come_from_others(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _OF_OTHERS.search(str(error)) is not None
    )
