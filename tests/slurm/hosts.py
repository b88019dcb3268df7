"""Hosts with a cable on one machine: network namespaces joined by a bridge in a namespace of its own.

Each host has a name, an address and an /etc/hosts; the machine's own network is not touched. Needs root and iproute2.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PROGRAMS = ("ip", "nsenter", "unshare")
PROBE = ("unshare", "--net", "ip", "link", "add", "one", "type", "veth", "peer", "name", "other")
"""Namespaces that are needed, made and left."""
SUBNET = "10.231.77"

# With /etc/hosts and the name of the host; every step execs, so that the process is that of the command.
_ENTER = 'mount --bind "$1" /etc/hosts; hostname "$2"; shift 2; exec "$@"'


class Hosts:
    """Hosts a, b, …; used as a context manager."""

    def __init__(self, folder: Path, names: Sequence[str] = ("hosta", "hostb")) -> None:
        """`folder` takes the hosts' /etc/hosts."""
        self.names = list(names)
        self._prefix = f"dcg{os.getpid()}"
        self._switch = f"{self._prefix}switch"
        self._etc_hosts = folder / "etc_hosts"
        lines = [f"{self.address(name)} {name}" for name in self.names]
        self._etc_hosts.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"{SUBNET}.{self.names.index(name) + 1}"

    def __enter__(self) -> Hosts:
        with ExitStack() as stack:
            self._make(stack)
            self._made = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._made.close()

    def command(self, name: str, words: Sequence[str]) -> list[str]:
        """What runs `words` on a host; the process is that of the command itself."""
        enter = ["nsenter", f"--net=/run/netns/{self._space(name)}"]
        enter += ["unshare", "--mount", "--uts", "--propagation", "private"]
        return [*enter, "bash", "-c", _ENTER, "_", str(self._etc_hosts), name, *words]

    def start(self, name: str, words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host, in a session of its own."""
        return subprocess.Popen(self.command(name, words), text=True, start_new_session=True, **options)

    def cut(self, name: str) -> None:
        """Pull the cable of a host: packets are lost without a word."""
        _ip("-n", self._switch, "link", "set", self._port(name), "nomaster")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        _ip("-n", self._switch, "link", "set", self._port(name), "master", "br0")

    def _make(self, stack: ExitStack) -> None:
        self._add_space(self._switch, stack)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for name in self.names:
            space, port = self._space(name), self._port(name)
            self._add_space(space, stack)
            # Both ends are made within namespaces: nothing appears on the machine.
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _add_space(self, space: str, stack: ExitStack) -> None:
        _ip("netns", "add", space)
        stack.callback(_ip, "netns", "del", space)
        _ip("-n", space, "link", "set", "lo", "up")

    def _space(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _port(self, name: str) -> str:
        return f"port{self.names.index(name)}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
