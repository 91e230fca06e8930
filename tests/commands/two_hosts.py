"""Two hosts on one machine: namespaces with their own network, host name and `/etc/hosts`, and a cable."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

from craft_ds.testing.permissions import is_not_permitted

_TOOLS = ("ip", "unshare", "nsenter")
# Without root, the first host creates a user namespace in which this user may set up networks.
_NEW_USER = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
_SAME_USER = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]


class NotPermittedError(RuntimeError):
    """This machine does not permit what two hosts need, or lacks a tool."""


class Host(NamedTuple):
    """One host.

    Attributes:
        name: Its host name, which both hosts resolve to its address.
        address: Its IPv4 address.
        holder: Identifier of the process that keeps its namespaces.
    """

    name: str
    address: str
    holder: int

    def command(self, *command: object, cwd: Path | None = None) -> list[str]:
        """Return a command that runs the given one on this host, in a directory."""
        namespaces = [*_SAME_USER, "--net", "--uts", "--mount"]
        entered = ["nsenter", f"--target={self.holder}", *namespaces, f"--wdns={cwd or Path.cwd()}"]
        return [str(part) for part in (*entered, *command)]

    def run(self, *command: object) -> str:
        """Run a short command on this host and return what it prints.

        Raises:
            RuntimeError: It failed.
        """
        ended = subprocess.run(
            self.command(*command), capture_output=True, text=True, timeout=30, check=False
        )
        if ended.returncode:
            raise _error(f"{self.name}: {' '.join(map(str, command))}: {ended.stderr.strip()}")
        return ended.stdout

    def cut_off(self) -> None:
        """Pull its cable: packets are lost without a word, and connections stay open."""
        self.run("ip", "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """Plug its cable in."""
        self.run("ip", "link", "set", "eth0", "up")

    def processes(self) -> dict[int, str]:
        """Return the processes that run on this host, with their command lines."""
        network = _network_of(self.holder)
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.holder:
                try:
                    if _network_of(int(entry.name)) == network:
                        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        found[int(entry.name)] = line
                except OSError:  # it has ended, or is another user's
                    continue
        return found

    def kill(self) -> None:
        """Kill every process of the host at once, as a loss of power does."""
        while processes := self.processes():
            for process in processes:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)


def _error(message: str) -> RuntimeError:
    return (NotPermittedError if is_not_permitted(message) else RuntimeError)(message)


@contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, Host]]:
    """Create the hosts `node-a` and `node-b`; at the end, everything that runs on them is killed.

    Args:
        directory: Receives their `/etc/hosts`.

    Raises:
        NotPermittedError: This machine does not permit it, or lacks a tool; the message says which.
        RuntimeError: Anything else failed.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise NotPermittedError(f"not installed: {', '.join(missing)}")
    table = directory / "hosts"
    table.write_text("127.0.0.1 localhost\n10.77.0.1 node-a\n10.77.0.2 node-b\n")
    holders: list[subprocess.Popen] = []
    hosts: list[Host] = []
    try:
        for number, name in enumerate(("node-a", "node-b"), 1):
            enter = ["nsenter", f"--target={hosts[0].holder}", *_SAME_USER] if hosts and _SAME_USER else []
            user = [] if enter else _NEW_USER
            setup = f'hostname {name} && mount --bind "{table}" /etc/hosts && ip link set lo up && echo up'
            shell = ["sh", "-c", f"{setup} && exec cat"]
            namespaces = [*enter, "unshare", *user, "--net", "--uts", "--mount"]
            holders.append(
                subprocess.Popen([*namespaces, *shell], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)
            )
            assert holders[-1].stdout is not None
            assert holders[-1].stderr is not None
            if holders[-1].stdout.readline() != "up\n":
                raise _error(f"no namespaces: {holders[-1].stderr.read().strip()}")
            hosts.append(Host(name, f"10.77.0.{number}", holders[-1].pid))
        one, other = hosts
        one.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", other.holder)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.plug_in()
        yield one, other
    finally:
        for host in hosts:
            host.kill()
        for holder in holders:
            holder.kill()
            holder.communicate()


def _network_of(process: int) -> str:
    return str(Path(f"/proc/{process}/ns/net").readlink())
