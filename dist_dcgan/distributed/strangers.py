"""Other users of the machine: whether one has connected in the place of a rank, and whether torchrun is open to them.

Gloo takes whoever connects to it first with the right small number for a rank. Once its connections are made nobody can
come between, so they are checked then: Linux lists for each connection the user of either end.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dist_dcgan.distributed.launch import Launch
from shards.common.errors import OneRankError
from shards.common.messages import warn

_ESTABLISHED = "01"  # proc_pid_net(5), tcp
_FIRST_PERSON = 1000
"""The smallest user number of a person; smaller ones are the system's."""
_NOBODY = (65534, 65535)
_LOOPBACK = "7F"
_SECONDS_TO_ACCEPT = 3.0
_SECONDS_BETWEEN_LOOKS = 0.1
_MAPPED = "0000000000000000FFFF0000"
"""Precedes an IPv4 address in the table of IPv6."""


class _Row(NamedTuple):
    local: str
    remote: str
    state: str
    user: int
    inode: str


def require_no_strangers(before: frozenset[str]) -> None:
    """Raise OneRankError if a connection of this process, of those made since `before`, is with another user here.

    `before` are the sockets of this process (`own_sockets`) before it connected to the other ranks. A connection over
    the loopback interface of which the other end is not listed is one of nobody knows whom. Before version 6.17 Linux
    lists user 0 until the other end has been accepted, so some seconds pass before one is taken for a stranger.
    """
    deadline = time.monotonic() + _SECONDS_TO_ACCEPT
    while (who := _stranger(own_sockets() - before)) is not None:
        if time.monotonic() > deadline:
            raise OneRankError(
                f"a process of {who} on this machine has connected in the place of a rank: start again, and tell "
                "your administrator"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _stranger(ours: frozenset[str]) -> str | None:
    """Return whose process, of another user, is at the other end of one of `ours`; None if there is none."""
    rows = list(_rows())
    users = {(row.local, row.remote): row.user for row in rows}
    for row in rows:
        if row.state == _ESTABLISHED and row.inode in ours:
            user = users.get((row.remote, row.local))
            if user not in (None, os.geteuid()) or (user is None and _is_loopback(row.local)):
                return "an unknown user" if user is None else f"user {user}"
    return None


def own_sockets() -> frozenset[str]:
    """Return the sockets of this process."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # closed meanwhile
                link = os.readlink(f"/proc/self/fd/{name}")
                if link.startswith("socket:["):
                    found.add(link[len("socket:[") : -1])
    return frozenset(found)


def warn_of_open_agent(launch: Launch) -> None:
    """Warn if torchrun, on one machine, meets where any user of it may run code as this one, and there are others."""
    if launch.nodes > 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    others = other_users()
    if others:
        warn(
            f"processes of user {others[0]} run on this machine, and torchrun's port is open to them: they could end "
            "this run, or run code as you: start with `bash launch/torchrun.sh FLAGS`, which opens none"
        )


def other_users() -> list[int]:
    """Return the numbers of other people who run processes on this machine, as far as it shows them."""
    found = set()
    with suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdigit():
                with suppress(OSError):  # ended meanwhile
                    found.add(os.stat(f"/proc/{name}").st_uid)
    return sorted(user for user in found - {os.getuid()} if user >= _FIRST_PERSON and user not in _NOBODY)


def _rows() -> Iterator[_Row]:
    """Yield the TCP sockets of this machine; none if the system does not list them."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                words = line.split()
                yield _Row(
                    words[1].removeprefix(_MAPPED), words[2].removeprefix(_MAPPED), words[3], int(words[7]), words[9]
                )


def _is_loopback(address: str) -> bool:
    return len(address.partition(":")[0]) == 8 and address[6:8] == _LOOPBACK  # the bytes of an IPv4 address, last first
