"""Real HTTP servers on this machine: one that misbehaves as it is told, and a process to stop or kill."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.support.commands import SECONDS


@dataclass
class Answer:
    """How a request is answered; by default as an honest server does."""

    content: bytes = b""
    status: int = 0
    """Another status than the honest one; then there is no body."""
    cut: int | None = None
    """Bytes of the body after which the connection ends."""
    hang: int | None = None
    """Bytes of the body after which nothing comes any more, and the connection stays open."""
    ranges: bool = True
    """Whether Range is honoured."""
    if_range: bool = True
    """Whether If-Range is honoured where Range is."""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Headers in place of the honest ones; None leaves one out."""


@dataclass(frozen=True)
class Request:
    """What was asked for, and how many bytes of body it is sent."""

    path: str
    range: str | None
    served: int


class Server:
    """Gives the n-th request the n-th answer, and every later one the last."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.begun = 0
        self.closing = threading.Event()
        self.address = ""

    def next_answer(self) -> Answer:
        self.begun += 1
        return self.answers[min(self.begun, len(self.answers)) - 1]

    @property
    def served(self) -> int:
        """Bytes of all bodies together."""
        return sum(request.served for request in self.requests)

    @property
    def ranges(self) -> list[str | None]:
        return [request.range for request in self.requests]


@contextmanager
def serve(*answers: Answer) -> Iterator[Server]:
    """Run a server while the block runs."""
    server = Server(*answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _respond(self, server)

        def do_POST(self) -> None:
            _respond(self, server)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads, http.block_on_close = True, False
        server.address = f"http://127.0.0.1:{http.server_port}/scenes/"
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            http.shutdown()
            thread.join()


def _respond(handler: BaseHTTPRequestHandler, server: Server) -> None:
    answer = server.next_answer()
    status, body, headers = _honest(answer, handler.headers.get("Range"), handler.headers.get("If-Range"))
    handler.send_response(status)
    for name, value in {**headers, **answer.headers}.items():
        if value is not None:
            handler.send_header(name, value)
    sent = body[: min(x for x in (answer.cut, answer.hang, len(body)) if x is not None)]
    # before it is answered: a client that does not want the answer asks again at once
    server.requests.append(Request(handler.path, handler.headers.get("Range"), len(sent)))
    handler.end_headers()
    handler.wfile.write(sent)
    handler.wfile.flush()
    if answer.hang is not None:
        server.closing.wait(30)


def _honest(answer: Answer, ranged: str | None, if_range: str | None) -> tuple[int, bytes, dict[str, str | None]]:
    if answer.status:
        return answer.status, b"", {}
    total = len(answer.content)
    etag = answer.headers.get("ETag", '"one"')
    headers: dict[str, str | None] = {"ETag": etag, "Content-Length": str(total)}
    validators = (etag, answer.headers.get("Last-Modified"))
    match = re.fullmatch(r"bytes=(\d+)-", ranged or "")
    if not match or not answer.ranges or (answer.if_range and if_range not in validators):
        return 200, answer.content, headers
    start = int(match[1])
    if start >= total:
        return 416, b"", {"Content-Range": f"bytes */{total}", "Content-Length": "0"}
    body = answer.content[start:]
    content_range = f"bytes {start}-{total - 1}/{total}"
    return 206, body, headers | {"Content-Range": content_range, "Content-Length": str(len(body))}


@contextmanager
def web_server(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Python's own web server in a process that can be stopped and killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + SECONDS
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                assert time.monotonic() < end
                time.sleep(0.05)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextmanager
def signed_server(folder: Path, signatures: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of a folder to requests whose query is the last of `signatures`; the others get 403.

    Yields the address and the list of all paths that are asked for.
    """
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.partition("?")[2] == signatures[-1]:
                super().do_GET()
            else:
                self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", asked
        finally:
            http.shutdown()
            thread.join()
