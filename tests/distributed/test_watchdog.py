"""Parts of the watchdog that need one rank; `tests/distributed/test_lost_ranks.py` has the others."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from craft_ds.distributed.collectives import group_timeout
from craft_ds.distributed.watchdog import RankWatchdog, _may_be_caused_by_other_rank

OF_OTHERS = [
    RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:11931"),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv"),
    RuntimeError("NCCL error: remote process exited or there was a network error"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated."),
    dist.DistBackendError("ncclRemoteError"),
    dist.DistNetworkError("Failed to recv, got 0 bytes"),
]
OWN = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    KeyError("gloo"),
    ConnectionResetError("Connection reset by peer"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", OF_OTHERS)
def test_errors_that_another_rank_may_have_caused(error):
    assert _may_be_caused_by_other_rank(error)


@pytest.mark.parametrize("error", OWN)
def test_errors_of_this_rank(error):
    assert not _may_be_caused_by_other_rank(error)


def test_one_rank_starts_no_thread():
    before = threading.active_count()
    watchdog = RankWatchdog(timeout=0.01, interval=0.01)
    watchdog.progress()
    assert threading.active_count() == before
    assert watchdog.explain(OF_OTHERS[0]) is None
    watchdog.close()
    watchdog.close(OWN[0])


@pytest.mark.parametrize(("rank_timeout", "minutes"), [(600, 30), (900, 30), (3600, 120)])
def test_the_group_timeout_exceeds_the_watchdogs(rank_timeout, minutes):
    assert group_timeout(rank_timeout) == timedelta(minutes=minutes)
