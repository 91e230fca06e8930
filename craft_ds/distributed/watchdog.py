"""Watchdog over the ranks: a rank that dies or hangs is named, and the others exit.

Without it, torch raises 'Connection closed by peer' on some ranks without naming the rank, or waits 30
minutes.
"""

import faulthandler
import os
import queue
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from craft_ds.distributed.collectives import gather_objects
from craft_ds.distributed.diagnosis import (
    RESUME,
    Diagnosis,
    RankStatus,
    hanging_ranks,
    name_ranks,
    place_of,
    silent_ranks,
)
from craft_ds.distributed.env import is_local_rank0
from craft_ds.distributed.heartbeat_store import Heartbeat, HeartbeatStore, count_collectives
from craft_ds.errors import LOST_RANK_STATUS, RankLost, one_line

# The last pattern appears when a launcher ends all processes after one has died.
_CAUSED_BY_OTHER_RANK = re.compile(
    r"gloo|nccl|c10d|Connection (closed|reset|refused)|Broken pipe|killed by signal: Terminated",
    re.IGNORECASE,
)


class RankWatchdog:
    """Heartbeats of this rank and a watch over the others. Does nothing in a run of one rank.

    Two threads run. One publishes a heartbeat in the store every `interval` seconds and reads the others'
    messages. The other never touches the store, which may hang with its host, and only watches the clock.
    When no rank has made progress for `timeout` seconds, every rank publishes the position of its main
    thread and, within 10 intervals, ends its process with status `LOST_RANK_STATUS`, even while the main
    thread is inside C++ or CUDA; one rank per machine prints on stderr which rank is the cause. A rank ends
    at the latest 14 intervals after the timeout, and also if it is still running 10 intervals after another
    rank exited with an error.

    Not every wait ends with an error when another rank dies: a new process group waits for the rank's
    address, NCCL for its memory. So each rank watches the heartbeat of the next one. When it has stopped for
    10 intervals, all ranks are checked and the silent ones are named, within 15 intervals. Time during which
    this process itself is stopped is not counted.

    Clocks of different machines are never compared, and the main thread only increments a counter.

    The constructor is collective: call it on all ranks, from the thread that trains.

    Args:
        timeout: Seconds without progress on any rank after which the ranks end. Counted from the first
            `progress` call, so that building the model may take any time.
        interval: Seconds between heartbeats.
        output_dir: Directory for the stacks of the threads when a run hangs, once it exists.
    """

    def __init__(self, timeout: float, interval: float = 3.0, output_dir: Path | None = None):
        self._output_dir = output_dir
        self._timeout = timeout
        self._interval = interval
        self._progress = 0
        self._unanswered = False
        self._missing: tuple[int, ...] = ()
        self._speaker: bool | None = None
        self._diagnosing = threading.Lock()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._alone:
            return
        self._main = threading.get_ident()
        self._rank = dist.get_rank()
        # Several runs of one process share a store, as do the restarts of an elastic launcher.
        ranks = gather_objects((secrets.token_hex(8), socket.gethostname()))
        run = ranks[0][0]
        self._hosts = [host for _, host in ranks]
        self._store = HeartbeatStore(self._rank, dist.get_world_size(), run)
        self._heartbeat = Heartbeat(0, False, None, 0, False)
        self._queries: queue.Queue[tuple[Callable[[], Any], Future] | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=target, name=f"watchdog-{target.__name__.strip('_')}", daemon=True)
            for target in (self._exchange, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Announce the exit; raise `RankLost` instead of an error that another rank caused."""
        lost = self.explain(error) if error is not None else None
        self.close(lost or error)
        if lost is not None:
            raise lost from error

    def progress(self) -> None:
        """Record progress of the main thread: a step, a batch or a piece of a file is done."""
        self._progress += 1

    def explain(self, error: BaseException) -> RankLost | None:
        """Find the rank that caused the error of a collective on this rank. Never raises.

        Compares the heartbeats at two moments, two intervals apart, and names the ranks whose heartbeat has
        stopped. Takes 3 intervals, and 2 more if the host of the store hangs.

        Returns:
            The error to raise instead; None if it is this rank's own error or no rank is silent.
        """
        if self._alone or self._closing.is_set() or not _may_be_caused_by_other_rank(error):
            return None
        # The watching thread may be about to end the process with its own diagnosis; from here on it does
        # not.
        if not self._diagnosing.acquire(timeout=14 * self._interval):
            return None
        try:
            diagnosis = self._silent()
        except Exception:
            diagnosis = self._without_store()
        if diagnosis is None:
            self._diagnosing.release()
            return None
        self._tell(diagnosis)
        return RankLost(diagnosis.line, prints=self._prints_message())

    def close(self, error: BaseException | None = None) -> None:
        """Announce this rank's exit, so that it is not reported, and end the threads. Idempotent.

        The rank that hosts the store waits until the others have exited too, for at most 4 intervals, so that
        they can read why it exits.

        Args:
            error: Why this rank exits early. Published unless another rank has already given a reason.
        """
        if self._alone or self._closing.is_set():
            return
        if error is not None:
            line = f"{self._name(self._rank)} failed: {type(error).__name__}: {one_line(error)}"
            self._tell(Diagnosis(line, (self._rank,)))
        self._announce_exit()
        self._closing.set()
        self._queries.put(None)
        for thread in self._threads:
            thread.join(self._interval)

    # The thread that uses the store.

    def _exchange(self) -> None:
        reported = 0
        while True:
            query = None
            try:
                query = self._queries.get(timeout=self._interval)
                if query is None:
                    return
            except queue.Empty:
                pass
            try:
                heard, done = self._heartbeat.told, self._progress
                self._heartbeat = self._store.beat(done - reported)
                reported = done
                if self._heartbeat.asked:
                    self._store.write_place(place_of(self._main, count_collectives()))
                # Decide who prints the message before the store may end. Local rank 0 has the first chance.
                if (
                    self._heartbeat.told
                    and self._rank not in self._heartbeat.told.ranks
                    and (heard or is_local_rank0())
                ):
                    self._claim()
                if query is not None:
                    query[1].set_result(query[0]())
                settled = self._heartbeat.told is None or self._speaker is not None
                if self._heartbeat.host_closed and settled and self._rank != self._store.host_rank:
                    return
            except Exception as error:  # the store is gone for good
                if query is not None:
                    query[1].set_exception(error)
                return

    def _query(self, query: Callable[[], Any]) -> Any:
        """Run a query on the store in its thread, for at most two intervals.

        Raises:
            Exception: The store is gone, or its host hangs.
        """
        if self._unanswered or not self._threads[0].is_alive():
            raise ConnectionError("the store does not answer")
        answer: Future = Future()
        self._queries.put((query, answer))
        try:
            return answer.result(timeout=2 * self._interval)
        except TimeoutError:
            self._unanswered = True
            raise

    def _try(self, query: Callable[[], Any]) -> Any:
        try:
            return self._query(query)
        except Exception:
            return None

    # The thread that watches the clock.

    def _watch(self) -> None:
        seen, beat = (0, 0), 0
        stalled = overdue = silent = 0.0
        before = time.monotonic()
        while not self._closing.wait(self._interval / 2):
            now = time.monotonic()
            # Time during which this process or its machine was stopped is not waiting time.
            passed = min(now - before, self._interval)
            before = now
            news = self._heartbeat
            done = (self._progress, news.progress)
            stalled = stalled + passed if done == seen and self._progress else 0.0
            overdue = overdue + passed if news.told else 0.0
            # The next rank's heartbeat also stands still if the store no longer answers.
            silent = silent + passed if news.next_beat == beat else 0.0
            seen, beat = done, news.next_beat
            late = stalled >= self._timeout or overdue >= 10 * self._interval
            if (late or silent >= 10 * self._interval) and self._diagnosing.acquire(blocking=False):
                self._end_if_stalled(stalled if late else None)
                self._diagnosing.release()
                stalled = silent = 0.0

    def _end_if_stalled(self, stalled: float | None) -> None:
        """End the process, unless all ranks are alive and one makes progress after all.

        Args:
            stalled: Seconds without progress; None: only a heartbeat is missing.
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
            prints = self._prints_message()
            if prints or self._rank in diagnosis.ranks:
                self._report(diagnosis.line if prints else None)
            self._announce_exit()
        finally:
            os._exit(LOST_RANK_STATUS)

    # Diagnoses.

    def _silent(self) -> Diagnosis | None:
        return self._heartbeat.told or self._compare(intervals=2)[0]

    def _hanging(self, stalled: float) -> Diagnosis | None:
        if self._heartbeat.told:
            return self._heartbeat.told
        self._query(self._store.ask)
        done = (self._progress, self._heartbeat.progress)
        diagnosis, statuses = self._compare(intervals=4)
        if diagnosis or self._closing.is_set():
            return diagnosis
        if done != (self._progress, self._heartbeat.progress):
            return None
        return hanging_ranks(statuses, stalled, self._hosts)

    def _compare(self, intervals: int) -> tuple[Diagnosis | None, list[RankStatus]]:
        """Compare the statuses at two moments; return a diagnosis that another rank publishes meanwhile."""
        before = self._query(self._store.beats)
        for _ in range(2 * intervals):
            if self._heartbeat.told or self._closing.wait(self._interval / 2):
                return self._heartbeat.told, []
        statuses = self._query(lambda: self._store.statuses(before))
        if self._heartbeat.told:
            return self._heartbeat.told, statuses
        diagnosis = silent_ranks(statuses, intervals * self._interval, self._hosts)
        self._missing = diagnosis.ranks if diagnosis else ()
        return diagnosis, statuses

    def _without_store(self, stalled: float | None = None) -> Diagnosis | None:
        """Report the host of the store, unless it gave a reason or exited on its own."""
        if self._heartbeat.told:
            return self._heartbeat.told
        if self._heartbeat.host_closed:
            if stalled is None:
                return None
            where = place_of(self._main, None).where
            return Diagnosis(
                f"{self._name(self._rank)} hangs in {where} for {stalled:.0f} s; {RESUME}", (self._rank,)
            )
        if self._store.host_rank is None:
            line = (
                f"the launcher's agent on the machine of {self._name(0)} has stopped or the machine is gone"
            )
            return Diagnosis(f"{line}: the store that it hosts does not answer; {RESUME}", ())
        host = self._store.host_rank
        line = (
            f"{self._name(host)} has stopped or its machine is gone: the store that it hosts does not answer"
        )
        return Diagnosis(f"{line}; {RESUME}", (host,))

    # Messages to the other ranks and to the user.

    def _name(self, rank: int) -> str:
        return name_ranks([rank], self._hosts)

    def _report(self, line: str | None) -> None:
        """Print a line, and write the stacks of all threads of this rank to a file that the line names.

        The line comes first, and not through sys.stderr: the disk may hang, as the main thread may that holds
        its lock.
        """
        name = "stacks_rank_{}.txt"
        directory = self._output_dir if self._output_dir and self._output_dir.is_dir() else None
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="craft_ds_"))
        if line is not None:
            os.write(2, f"error: {line}; stacks of threads: {directory / name.format('*')}\n".encode())
        with (directory / name.format(self._rank)).open("w") as file:
            faulthandler.dump_traceback(file=file)

    def _tell(self, why: Diagnosis) -> None:
        self._try(lambda: self._store.tell(why))

    def _claim(self) -> None:
        """Claim the right to print. Call on the thread that uses the store."""
        if self._speaker is None:
            self._speaker = self._store.claim()

    def _prints_message(self) -> bool:
        """Return True on the rank of each machine that prints: local rank 0, if it claims in time."""
        if not is_local_rank0():
            self._closing.wait(self._interval)
        if self._speaker is None:
            self._try(self._claim)
        return self._speaker is not False

    def _announce_exit(self) -> None:
        self._try(self._store.close)
        deadline = time.monotonic() + 4 * self._interval
        while self._store.host_rank == self._rank and time.monotonic() < deadline:
            if self._try(lambda: self._store.all_closed(but=self._missing)):
                return
            time.sleep(0.05)


def _may_be_caused_by_other_rank(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _CAUSED_BY_OTHER_RANK.search(str(error)) is not None
    )
