"""One HTTP request to a server that is not trusted: time limits, redirects and credentials."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import IntEnum
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import SplitResult, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import default_headers, get_auth_from_url, get_netrc_auth, requote_uri
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

_MOST_REDIRECTS = 10
_PORTS = {"http": 80, "https": 443}


class RedirectError(ValueError):
    """A redirect that is not followed; the message says why, without the target, which may be signed."""


class Reach(IntEnum):
    """From where a server can be reached, the nearest first."""

    MACHINE = 0
    """From this machine or link: a loopback or link-local address, or one of this machine's own."""
    PRIVATE = 1
    PUBLIC = 2

    @classmethod
    def of(cls, peer: str, own: str) -> Reach:
        """Return the reach of the server at the IP address `peer`, connected to from `own`."""
        address = ipaddress.ip_address(peer.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        if peer == own or address.is_loopback or address.is_link_local:
            return cls.MACHINE
        return cls.PUBLIC if address.is_global else cls.PRIVATE


class Guard:
    """Context manager that ends the connections of a request at a deadline, and refuses those that it must not make.

    The timeout of a socket starts again at each byte: a server could send one byte a minute, or headers, trailers and
    interim answers without end.
    """

    def __init__(self, seconds: float) -> None:
        self.expired = False
        self._deadline = time.monotonic() + seconds
        self._least_bytes, self._window_seconds, self._bytes = 0.0, seconds, 0
        self._connections: list[socket.socket] = []
        self._furthest = Reach.MACHINE
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline of a request", daemon=True)

    def allow(self, seconds: float) -> None:
        """Set the deadline to `seconds` from now, which must not be earlier than before."""
        self._deadline = time.monotonic() + seconds

    def require(self, bytes_per_second: float, over_seconds: float) -> None:
        """Require a rate of the body from now on: in any period of `over_seconds`."""
        self._least_bytes, self._window_seconds, self._bytes = bytes_per_second * over_seconds, over_seconds, 0
        self.allow(over_seconds)

    def advance(self, count: int) -> None:
        """Add `count` bytes of the body."""
        self._bytes += count
        if self._bytes >= self._least_bytes:
            self._bytes = 0
            self.allow(self._window_seconds)

    def admit(self, connection: socket.socket) -> None:
        """Watch a new connection; raises RedirectError if a server sends this machine to what it may not reach itself.

        Services of this machine and of a private network often trust whoever reaches them. The address of the
        connection counts, not its name.
        """
        reach = Reach.of(connection.getpeername()[0], connection.getsockname()[0])
        if reach < self._furthest:
            where = "this machine" if reach == Reach.MACHINE else "a private network, which it is not in"
            raise RedirectError(f"it redirects to a service of {where}")
        self._furthest = reach
        self.watch(connection)

    def watch(self, connection: socket.socket) -> None:
        """Watch a new connection."""
        self._connections.append(connection.dup())  # stays valid if TLS takes over the socket
        if self.expired:
            self._cut()

    def _watch(self) -> None:
        while (seconds := self._deadline - time.monotonic()) > 0:
            if self._done.wait(seconds):
                return
        self.expired = True
        self._cut()

    def _cut(self) -> None:
        for connection in list(self._connections):
            with suppress(OSError):  # closed by the server
                connection.shutdown(socket.SHUT_RDWR)  # a read that waits ends at once

    def __enter__(self) -> Guard:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        for connection in self._connections:
            connection.close()


class _GuardedConnection(HTTPConnection):
    guard: ClassVar[Guard]

    def _new_conn(self) -> socket.socket:
        connection = super()._new_conn()
        try:
            (self.guard.admit if self.proxy is None else self.guard.watch)(connection)
        except BaseException:
            connection.close()
            raise
        return connection


class _GuardedAdapter(HTTPAdapter):
    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        super().__init__()

    def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> HTTPConnectionPool:
        pool = super().get_connection_with_tls_context(*arguments, **options)
        if not issubclass(pool.ConnectionCls, _GuardedConnection):
            kinds = (_GuardedConnection, pool.ConnectionCls)
            pool.ConnectionCls = type("_Guarded", kinds, {"guard": self._guard})
        return pool


def get(
    address: str, headers: Mapping[str, str], guard: Guard, connect_seconds: float, read_seconds: float
) -> requests.Response:
    """Return the response, its body unread, after at most 10 redirects, whose bodies are not read.

    The user and password of the address, or of ~/.netrc, are sent to the origin of `address` only. Raises ValueError
    for an address or a redirect that is not followed, requests' exceptions and OSError if the request fails.
    """
    given = urlsplit(address)
    auth = get_auth_from_url(address) if "@" in given.netloc else get_netrc_auth(address)
    target = given._replace(netloc=given.netloc.rpartition("@")[2])
    with requests.Session() as session:
        adapter = _GuardedAdapter(guard)
        for _ in range(_MOST_REDIRECTS + 1):
            guard.allow(connect_seconds + read_seconds)
            allowed = auth if _is_same_origin(given, target) else None
            request = requests.Request(
                "GET",
                target.geturl(),
                headers={**default_headers(), "Accept-Encoding": "identity", **headers},  # lengths are of the file
                auth=allowed,
            ).prepare()  # not by the session, which adds what ~/.netrc has for any host
            settings = session.merge_environment_settings(request.url or "", {}, True, None, None)
            response = adapter.send(request, timeout=(connect_seconds, read_seconds), **settings)
            location = session.get_redirect_target(response)
            if location is None:
                return response
            response.close()  # unread: its body may have any length
            target = _redirected(target, location)
    raise RedirectError(f"it redirects more than {_MOST_REDIRECTS} times")


def _redirected(source: SplitResult, location: str) -> SplitResult:
    """Return the target of a redirect; raises RedirectError if it is not to be followed."""
    try:
        target = urlsplit(urljoin(source.geturl(), requote_uri(location)))
        known = target.scheme in _PORTS and _origin(target)[1]
    except ValueError:  # its text has the target
        known = None
    if not known:
        raise RedirectError("it redirects to what is no address of http or https")
    if source.scheme == "https" and target.scheme == "http":
        raise RedirectError("it redirects from https to http, which others can read and change")
    if "@" in target.netloc:
        raise RedirectError("it redirects to an address with a user or password in it")
    return target


def _is_same_origin(given: SplitResult, target: SplitResult) -> bool:
    """Return whether credentials for `given` may be sent to `target`: the same server, or the same one by https."""
    upgraded = ("https", given.hostname, 443) if _origin(given) == ("http", given.hostname, 80) else None
    return _origin(target) in (_origin(given), upgraded)


def _origin(address: SplitResult) -> tuple[str, str | None, int | None]:
    return address.scheme, address.hostname, address.port or _PORTS.get(address.scheme)
