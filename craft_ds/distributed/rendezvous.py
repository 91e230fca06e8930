"""Rendezvous: the ranks of a launch meet in one store, or exit with a line that says what is in the way.

torch's own rendezvous waits 30 minutes in silence for a host that does not come, and its errors name neither
the variable nor the host.
"""

import ipaddress
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from craft_ds.distributed.env import Launch
from craft_ds.errors import LOST_RANK_STATUS, RankLost, UserError, one_line

IFNAME = "GLOO_SOCKET_IFNAME"
# A name service may learn the name of a host only after it has started, as in Kubernetes.
RESOLVE_S = 60.0
_SAY_AFTER_S = 10.0
_POLL_S = 0.2
_meetings = itertools.count()


class Peer(NamedTuple):
    """What the other ranks learn about a rank.

    Attributes:
        host: Its host name.
        network: Identifies the machine and network namespace.
        address: Address on which gloo listens; empty if `GLOO_SOCKET_IFNAME` decides.
        interfaces: Network interfaces of its machine, except the loopback one.
        process: Identifies the process.
    """

    host: str
    network: str
    address: str
    interfaces: list[str]
    process: str


def agent_hosts_store() -> bool:
    """Return True if the agent of an elastic launcher (torchrun) hosts the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(launch: Launch, timeout: float) -> tuple[dist.Store, list[str]]:
    """Return the store of a launch and each rank's host, when all have joined. Collective: call on all ranks.

    Args:
        launch: This rank's launch, by a launcher.
        timeout: Seconds to wait for the other ranks (`--rank_timeout`).

    Raises:
        RankLost: Ranks have not joined in time; names them.
        UserError: The network or its variables are wrong; names the variable.
    """
    _check_interface()
    deadline = time.monotonic() + timeout
    hosts_store = launch.rank == 0 and not agent_hosts_store()
    if not hosts_store:
        _wait_for_host(launch, timeout)
    try:
        # A program of another kind that listens there never answers, which torch does not notice.
        with _ends_after(deadline - time.monotonic(), _silence(launch, timeout, "another program listens")):
            store: dist.Store = dist.TCPStore(
                launch.address,
                launch.port,
                launch.world_size,
                is_master=hosts_store,
                timeout=timedelta(seconds=max(1.0, deadline - time.monotonic())),
                wait_for_workers=False,
                multi_tenant=True,
            )
    except dist.DistError as error:
        if not hosts_store or "EADDRINUSE" not in str(error):
            line = _silence(launch, timeout, one_line(error, 120))
            raise RankLost(line, prints=launch.local_rank == 0) from None
        raise UserError(
            f"MASTER_PORT={launch.port} is in use on {socket.gethostname()}: choose a free port with "
            "--master_port (deepspeed), --master-port (torchrun), or MASTER_PORT on all hosts"
        ) from None
    # torchrun's static rendezvous keeps one store across restarts, with the addresses of dead ranks; and one
    # process may form a group several times.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt_{attempt}/{next(_meetings)}", store)
    try:
        peers = _exchange(store, launch, deadline, timeout)
    except dist.DistError:
        where = f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port}"
        line = f"the store at {where} ended before all ranks joined {_me(launch)}: see the error of rank 0"
        raise RankLost(line, prints=launch.local_rank == 0) from None
    _check_addresses(peers)
    return store, [peer.host for peer in peers]


@contextmanager
def connecting(launch: Launch, hosts: list[str], timeout: float) -> Iterator[None]:
    """Bound the time in which the ranks connect to each other; torch would wait for the group's timeout.

    A firewall may pass MASTER_PORT but not the ports that gloo and NCCL choose.

    Args:
        launch: This rank's launch.
        hosts: The host of each rank.
        timeout: Seconds after which the process ends with `LOST_RANK_STATUS`.

    Raises:
        RankLost: The ranks cannot connect.
    """

    def line(why: str) -> str:
        return (
            f"{_me(launch)} cannot connect to all of {', '.join(dict.fromkeys(hosts))}: {why}; set {IFNAME} "
            "and NCCL_SOCKET_IFNAME to the network interface that the hosts share, and open its ports"
        )

    try:
        with _ends_after(timeout, line(f"no answer in {timeout:.0f} s (--rank_timeout)")):
            yield
    except RuntimeError as error:  # gloo's and NCCL's
        raise RankLost(line(one_line(error, 200)), prints=launch.local_rank == 0) from error


@contextmanager
def _ends_after(seconds: float, line: str) -> Iterator[None]:
    """End the process with a line if the context takes longer: torch waits in C++, uninterrupted."""

    def end() -> None:
        os.write(2, f"error: {line}\n".encode())
        os._exit(LOST_RANK_STATUS)

    timer = threading.Timer(min(max(0.0, seconds), threading.TIMEOUT_MAX), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wait_for_host(launch: Launch, timeout: float) -> None:
    """Return when the host of the store listens; in Python, so that Ctrl-C ends the wait.

    Raises:
        RankLost: It does not in `timeout` seconds.
        UserError: `MASTER_ADDR` does not resolve in `RESOLVE_S` seconds.
    """
    started, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=5.0).close()
            return
        except OSError as error:
            waited, why = time.monotonic() - started, error
        unknown = isinstance(why, socket.gaierror)
        if unknown and waited >= min(RESOLVE_S, timeout):
            raise UserError(
                f"MASTER_ADDR={launch.address} does not resolve on {socket.gethostname()} ({why.strerror}): "
                "set it to the host name or IP address of the host of rank 0"
            )
        if waited >= timeout:
            raise RankLost(_silence(launch, timeout, one_line(why)), prints=launch.local_rank == 0)
        if not said and waited >= (0.0 if unknown else min(_SAY_AFTER_S, timeout / 2)):
            said = True
            _say(
                launch,
                f"waiting up to {min(RESOLVE_S, timeout) if unknown else timeout:.0f} s for rank 0 at "
                f"MASTER_ADDR={launch.address} MASTER_PORT={launch.port} ({why.strerror or why})",
            )
        time.sleep(_POLL_S)


def _silence(launch: Launch, timeout: float, why: str) -> str:
    return (
        f"rank 0 did not answer {_me(launch)} at MASTER_ADDR={launch.address} MASTER_PORT={launch.port} in "
        f"{timeout:.0f} s ({why}): start it with the same values, or raise --rank_timeout; without a "
        "launcher, unset RANK"
    )


def _exchange(store: dist.Store, launch: Launch, deadline: float, timeout: float) -> list[Peer]:
    """Publish this rank and return all ranks when they have joined.

    Raises:
        RankLost: Some have not joined by the deadline.
        UserError: Another process has this rank.
    """
    mine = json.dumps(_this_rank())
    key = f"rank/{launch.rank}"
    found = store.compare_set(key, "", mine).decode()
    if found != mine:
        raise UserError(
            f"RANK={launch.rank} is taken at MASTER_ADDR={launch.address} MASTER_PORT={launch.port} by a "
            f"process on {json.loads(found)[0]}: give each rank its own RANK and each run its own MASTER_PORT"
        )
    joined, said = store.add("joined", 1), False
    started = time.monotonic()
    while joined < launch.world_size:
        now = time.monotonic()
        if now > deadline or (not said and now - started > _SAY_AFTER_S):
            missing = [rank for rank in range(launch.world_size) if not store.check([f"rank/{rank}"])]
            names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}"
            names += ", …" * (len(missing) > 8)
            if missing and now > deadline:
                raise RankLost(
                    f"{names} of {launch.world_size} did not join {_me(launch)} in {timeout:.0f} s: start "
                    f"them with MASTER_ADDR={launch.address} MASTER_PORT={launch.port}, or raise "
                    "--rank_timeout",
                    prints=launch.local_rank == 0,
                )
            said = True
            _say(launch, f"waiting up to {timeout:.0f} s for {names} of {launch.world_size}")
        time.sleep(_POLL_S)
        joined = store.add("joined", 0)
    return [Peer(*json.loads(store.get(f"rank/{rank}"))) for rank in range(launch.world_size)]


def _this_rank() -> Peer:
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = f"{machine} {Path('/proc/self/ns/net').readlink()}"
    except OSError:  # not on Linux
        network = socket.gethostname()
    interfaces = [name for _, name in socket.if_nameindex() if name != "lo"]
    process = f"{os.getpid()} {time.monotonic_ns()}"
    return Peer(socket.gethostname(), network, gloo_address(), interfaces, process)


def gloo_address() -> str:
    """Return the address on which gloo will listen, as torch chooses it; empty if a variable decides."""
    if os.environ.get(IFNAME):
        return ""
    return next((address for address, is_own in host_addresses() if is_own), "127.0.0.1")  # torch's fallback


def host_addresses() -> list[tuple[str, bool]]:
    """Return the addresses of this host's name, each with whether it is one of this machine.

    The list is empty if the name does not resolve.
    """
    try:
        found = socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [
        (str(address[0]), _can_bind(family, kind, protocol, address))
        for family, kind, protocol, _, address in found
    ]


def _can_bind(family: int, kind: int, protocol: int, address: Any) -> bool:
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return True if an address, which may name its interface after a %, is reached on its machine alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def missing_interfaces() -> list[str]:
    """Return the interfaces that `GLOO_SOCKET_IFNAME` names and this machine does not have."""
    known = [name for _, name in socket.if_nameindex()]
    return [name for name in os.environ.get(IFNAME, "").split(",") if name and name not in known]


def _check_interface() -> None:
    """Refuse an interface that this machine does not have."""
    if missing := missing_interfaces():
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(
            f"{IFNAME}={os.environ[IFNAME]}: {socket.gethostname()} has no interface {missing[0]}, set it to "
            f"one of {known}"
        )


def _check_addresses(peers: list[Peer]) -> None:
    """Refuse ranks that others cannot reach: Debian gives a host's own name the address 127.0.1.1.

    All ranks have the same peers, so all raise the same error.
    """
    if len({peer.network for peer in peers}) == 1:
        return
    for rank, peer in enumerate(peers):
        if peer.address and is_loopback(peer.address):
            raise UserError(
                f"{peer.host} (rank {rank}) takes the address {peer.address} for its own name, where other "
                f"hosts cannot reach it: set {IFNAME} and NCCL_SOCKET_IFNAME there to its network interface "
                f"({', '.join(peer.interfaces) or 'it has none'}), or correct its /etc/hosts"
            )


def _me(launch: Launch) -> str:
    return f"rank {launch.rank} on {socket.gethostname()}"


def _say(launch: Launch, line: str) -> None:
    if launch.local_rank == 0:
        print(f"{_me(launch)}: {line}", file=sys.stderr, flush=True)
