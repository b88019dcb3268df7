"""Checks that the machines of a run can connect to each other, before a collective would hang."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from shards.common.errors import UserError, joined

_SECONDS_TO_CONNECT = 10.0
_MOST_AT_ONCE = 32
_SIOCGIFADDR = 0x8915  # netdevice(7)


class Endpoint(NamedTuple):
    """Address at which a machine listens, and the token that it sends to each client."""

    host: str
    address: str
    port: int
    token: str


def require_connected(store: Any, node: int, nodes: int, leads: bool) -> None:
    """Raise UserError, on all ranks, with the pairs of machines that cannot connect.

    Every rank calls it; on each machine, number `node` of `nodes`, the rank with `leads` tries. As in gloo, a machine
    offers the address to which it resolves its own name. `store` is one of torch.distributed, connected already.
    """
    if leads:
        _try_all(store, node, nodes)
    failures = [failure for other in range(nodes) for failure in json.loads(store.get(f"failures {other}"))]
    if failures:
        raise UserError(
            f"machines do not reach each other: {joined(failures)}: open the ports between them, or name the interface "
            "that joins them with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        )


def _try_all(store: Any, node: int, nodes: int) -> None:
    """Connect to all other machines, accept their connections, and write the failures to the store."""
    with ExitStack() as stack:
        try:
            endpoint: Endpoint | None = stack.enter_context(_answering())
            failures = []
        except OSError as error:
            endpoint, failures = None, [f"{socket.gethostname()} cannot listen ({error})"]
        store.set(f"endpoint {node}", json.dumps(endpoint))
        endpoints = [json.loads(store.get(f"endpoint {other}")) for other in range(nodes) if other != node]
        with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
            found = pool.map(lambda other: _try(Endpoint(*other)), (other for other in endpoints if other))
            failures += [failure for failure in found if failure]
        store.set(f"failures {node}", json.dumps(failures))
        store.wait([f"failures {other}" for other in range(nodes)])  # until all have tried to connect here


def _try(other: Endpoint) -> str | None:
    """Return why this machine cannot connect to `other`, None if it can."""
    here = socket.gethostname()
    try:
        with socket.create_connection((other.address, other.port), timeout=_SECONDS_TO_CONNECT) as connection:
            heard = connection.recv(len(other.token), socket.MSG_WAITALL).decode(errors="replace")
    except OSError as error:
        return f"{here} cannot connect to {other.host} at {other.address} ({error})"
    if heard != other.token:
        return f"{here} meets another program at {other.address}, which {other.host} takes for its address"
    return None


@contextmanager
def _answering() -> Iterator[Endpoint]:
    """Send a random token to each client; yield the endpoint."""
    token, address = secrets.token_hex(8), own_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=1024) as server:
        thread = threading.Thread(target=_answer, args=(server, token.encode()), name="connections", daemon=True)
        thread.start()
        try:
            yield Endpoint(socket.gethostname(), address, server.getsockname()[1], token)
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread
            thread.join()


def _answer(server: socket.socket, token: bytes) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError as error:
            if error.errno == errno.EINVAL:  # it was shut down
                return
            continue  # the client has disconnected
        with connection, suppress(OSError):
            connection.sendall(token)


def own_address() -> str:
    """Return the address at which gloo listens on this machine.

    It is that of GLOO_SOCKET_IFNAME, else the first local address to which the machine's name resolves, else 127.0.0.1.
    Raises OSError if there is no such interface.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        return _address_of(interface)
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    for family, kind, _, _, place in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.bind(place)
            except OSError:
                continue
            return str(place[0])
    return "127.0.0.1"


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(interface)[:15]))
        except OSError as error:
            raise OSError(f"GLOO_SOCKET_IFNAME={interface}: {error}") from None
    return socket.inet_ntoa(answer[20:24])
