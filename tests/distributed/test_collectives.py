"""Initialisation of the process group."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from craft_ds.distributed.collectives import init_process_group
from craft_ds.errors import UserError


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of torch, in order."""
    seen = []
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, timeout, rank, world_size, **_: seen.append((backend, timeout, rank, world_size)),
    )
    monkeypatch.setattr(
        "craft_ds.distributed.collectives.meet",
        lambda launch, timeout: (seen.append(timeout), (dist.HashStore(), ["node"] * launch.world_size))[1],
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: seen.append(index))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launch = {"WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "node", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    return seen


def test_every_rank_selects_its_gpu_first(calls, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    init_process_group(1200.0)
    assert calls == [3, 1200.0, ("cpu:gloo,cuda:nccl", timedelta(minutes=40), 3, 4)]


def test_more_ranks_than_gpus_are_refused(calls, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UserError, match="LOCAL_RANK=3, but this rank sees 3 accelerators"):
        init_process_group()
    assert calls == []


def test_without_a_launcher_the_group_has_one_rank(calls, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    init_process_group()
    assert calls == [("gloo", timedelta(minutes=30), 0, 1)]


def test_an_existing_group_is_kept(calls, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    init_process_group()
    assert calls == []
