"""Initialisation of the process group."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from craft_ds.distributed.collectives import init_process_group


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of torch, in order."""
    seen = []
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, timeout="torch's own", **k: seen.append((backend, timeout, *sorted(k))),
    )
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: seen.append(index))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    return seen


def test_every_rank_selects_its_gpu_first(calls, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    init_process_group(timedelta(minutes=40))
    given = ("rank", "store", "world_size")
    assert calls == [3, ("cpu:gloo,cuda:nccl", timedelta(minutes=40), *given)]


def test_without_a_launcher_the_group_has_one_rank(calls, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    init_process_group()
    assert calls == [("gloo", "torch's own", "rank", "store", "world_size")]


def test_an_existing_group_is_kept(calls, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    init_process_group()
    assert calls == []
