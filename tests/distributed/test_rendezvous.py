"""Ranks that cannot meet exit in `--rank_timeout` with one line that names the variable or the host."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from craft_ds.distributed.rendezvous import (
    Peer,
    _check_addresses,
    _check_interface,
    gloo_address,
)
from craft_ds.errors import LOST_RANK_STATUS, UserError

HOST = socket.gethostname()
PROGRAM = Path(__file__).with_name("rendezvous_rank.py")


def start(timeout: float = 3.0, **changes: object) -> subprocess.Popen:
    """Start rank 0 of 2 on this machine, with other values."""
    launch = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", **changes}
    return subprocess.Popen(
        [sys.executable, PROGRAM, str(timeout)],
        env=os.environ | {name: str(value) for name, value in launch.items()} | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str, float]:
    """Return the status, the lines that begin with `error: `, and the seconds since the imports."""
    output, _ = process.communicate(timeout=60)
    ended = time.time()
    print(output)
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    return process.returncode, "\n".join(errors), ended - float(re.search(r"^at (\S+)", output)[1])


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_all_ranks_meet(port):
    ends = [end(process) for process in [start(30, RANK=rank, MASTER_PORT=port) for rank in (0, 1)]]
    assert [status for status, *_ in ends] == [0, 0]


def test_rank_0_names_the_ranks_that_do_not_come(port):
    status, line, seconds = end(start(3, WORLD_SIZE=4, MASTER_PORT=port))
    assert status == LOST_RANK_STATUS
    assert line.startswith(f"error: ranks 1, 2, 3 of 4 did not join rank 0 on {HOST} in 3 s: ")
    assert f"MASTER_PORT={port}, or raise --rank_timeout" in line
    assert 3 <= seconds < 10


def test_a_rank_names_rank_0_that_does_not_come(port):
    status, line, seconds = end(start(3, RANK=1, MASTER_PORT=port))
    assert status == LOST_RANK_STATUS
    assert line.startswith(
        f"error: rank 0 did not answer rank 1 on {HOST} at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} in 3 s"
    )
    assert 3 <= seconds < 10


def test_a_name_that_does_not_resolve_is_named():
    status, line, seconds = end(start(3, RANK=1, MASTER_ADDR="no-such-host.invalid", MASTER_PORT=1))
    assert status == 2
    assert line.startswith(f"error: MASTER_ADDR=no-such-host.invalid does not resolve on {HOST} (")
    assert seconds < 10


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        status, line, seconds = end(start(30, MASTER_PORT=port))
    assert status == 2
    assert line.startswith(f"error: MASTER_PORT={port} is in use on {HOST}: choose a free port")
    assert seconds < 10


def test_a_program_of_another_kind_at_the_port_is_noticed():
    """It takes connections and never answers."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        status, line, seconds = end(start(3, RANK=1, MASTER_PORT=port))
    assert status == LOST_RANK_STATUS
    assert f"MASTER_PORT={port} in 3 s (another program listens)" in line
    assert seconds < 10


def test_a_rank_that_is_taken_is_named(port):
    first = start(8, MASTER_PORT=port, WORLD_SIZE=3)
    second = start(8, RANK=1, MASTER_PORT=port, WORLD_SIZE=3)
    time.sleep(0.5)
    third = start(8, RANK=1, MASTER_PORT=port, WORLD_SIZE=3)
    ends = [end(process)[:2] for process in (first, second, third)]
    taken = [line for status, line in ends if status == 2]
    assert len(taken) == 1
    assert f"RANK=1 is taken at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} by a process on {HOST}" in taken[0]


def test_a_firewall_between_the_ranks_is_bounded(port):
    """The ranks meet at MASTER_PORT, but the group does not form."""
    status, line, seconds = end(start(2, MASTER_PORT=port, STUCK="1"))
    assert status == LOST_RANK_STATUS
    assert line.startswith(
        f"error: rank 0 on {HOST} cannot connect to all of {HOST}, other: no answer in 2 s"
    )
    assert "GLOO_SOCKET_IFNAME" in line
    assert seconds < 10


def peer(host: str, network: str, address: str) -> Peer:
    return Peer(host, network, address, ["eth0", "ib0"], "1")


def test_loopback_addresses_are_refused_on_several_hosts_only():
    one, other = peer("a", "1", "127.0.1.1"), peer("b", "2", "10.0.0.2")
    _check_addresses([one, one])  # one machine
    _check_addresses([peer("a", "1", "10.0.0.1"), other])
    _check_addresses([peer("a", "1", ""), other])  # GLOO_SOCKET_IFNAME decides
    for address in ("127.0.1.1", "127.0.0.1", "::1"):
        with pytest.raises(UserError) as raised:
            _check_addresses([other, peer("a", "1", address)])
        message = str(raised.value)
        assert message.startswith(f"a (rank 1) takes the address {address} for its own name")
        assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in message
        assert "(eth0, ib0)" in message


def test_the_address_is_the_one_that_gloo_takes(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    resolved = {
        "Debian": (["127.0.1.1"], "127.0.1.1"),
        "of another machine first": (["192.0.2.1", "127.0.0.2"], "127.0.0.2"),
        "of another machine": (["192.0.2.1"], "127.0.0.1"),
    }
    for addresses, expected in resolved.values():
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda *_, addresses=addresses, **__: [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses
            ],
        )
        assert gloo_address() == expected
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert gloo_address() == ""


def test_an_interface_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nonsense0")
    with pytest.raises(
        UserError, match=f"^GLOO_SOCKET_IFNAME=lo,nonsense0: {HOST} has no interface nonsense0"
    ):
        _check_interface()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    _check_interface()


def test_what_ranks_publish_survives_json():
    one = peer("a", "1", "10.0.0.1")
    assert Peer(*json.loads(json.dumps(one))) == one
