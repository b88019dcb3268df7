"""A server that answers with any bytes at any speed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Script = Callable[[socket.socket, threading.Event], None]
"""Answers one request on a connection, until the event is set."""


class RawServer:
    """Address of the server, and the requests that it got."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.requests: list[str] = []


@contextmanager
def raw_server(script: Script, host: str = "127.0.0.1") -> Iterator[RawServer]:
    """Run a server while the block runs; `script` answers each request on a connection of its own."""
    closing = threading.Event()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        name = f"[{host}]" if ":" in host else host
        server = RawServer(f"http://{name}:{listener.getsockname()[1]}/scenes/")

        def answer(connection: socket.socket) -> None:
            with connection, suppress(OSError):  # the client goes away
                server.requests.append(connection.recv(1 << 16).decode())
                script(connection, closing)

        def accept() -> None:
            with suppress(OSError):  # closed
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            closing.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def says(*pieces: bytes) -> Script:
    """Send pieces, then close the connection."""

    def script(connection: socket.socket, closing: threading.Event) -> None:
        for piece in pieces:
            connection.sendall(piece)

    return script


def repeats(first: bytes, piece: bytes, seconds: float = 0.0) -> Script:
    """Send a beginning, then a piece for ever, one every so many seconds."""

    def script(connection: socket.socket, closing: threading.Event) -> None:
        connection.sendall(first)
        while not closing.wait(seconds):
            connection.sendall(piece)

    return script
