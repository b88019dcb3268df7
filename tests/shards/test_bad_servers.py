"""A server, or who sits on the line to it, cannot take more time, memory, disk or credentials than it is given."""

from __future__ import annotations

import gzip
import os
import resource
import shutil
import socket
import stat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from shards.common import http_request
from shards.common.errors import UserError
from shards.common.http import FetchOptions, fetch
from shards.common.http_request import Reach, RedirectError, _redirected
from tests.support.http_server import Answer, serve
from tests.support.raw_server import RawServer, Script, raw_server, repeats, says
from tests.support.waiting import wait_until

OK = b"HTTP/1.1 200 OK\r\n"
LIMITS = FetchOptions(10_000, attempts=2, silence_seconds=0.15, shown=False, copies=1, least_rate=20_000)
CONTENT = bytes(range(256)) * 30


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The seconds waited between attempts, which no test waits for."""
    waited: list[float] = []
    monkeypatch.setattr("shards.common.http.sleep", waited.append)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,::1")
    return waited


def refusal(address: str, part: Path, options: FetchOptions = LIMITS) -> str:
    with pytest.raises(UserError) as caught:
        fetch(address, part, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def moved(target: str, body: bytes = b"") -> bytes:
    length = f"Location: {target}\r\nContent-Length: {len(body)}\r\n\r\n"
    return b"HTTP/1.1 302 Found\r\n" + length.encode() + body


# Time


@pytest.mark.parametrize(
    "script",
    [
        repeats(OK, b"X", 0.05),
        repeats(OK + b"X-Header: ", b"X", 0.05),
        repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        repeats(OK + b"Content-Length: 9000\r\n\r\n", b"X", 0.05),
        repeats(OK + b"\r\n", b"X", 0.05),
        repeats(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nX\r\n", 0.05),
        repeats(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"X", 0.05),
        repeats(OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nX\r\n0\r\n", b"Trailer: X\r\n"),
    ],
    ids=["status", "header", "interim", "body", "no length", "chunks", "extension", "trailers"],
)
def test_a_server_that_drips_or_goes_on_for_ever_is_given_up(script: Script, tmp_path: Path) -> None:
    with raw_server(script) as server:
        line = refusal(server.address, tmp_path / "x.part")
        wait_until(lambda: len(server.requests) >= 2)  # on a busy machine it sees the second after the client has left
    assert "the server sends less than 20,000 bytes a second, after 2 attempts without progress" in line
    assert len(server.requests) == 2


def test_a_server_that_brings_one_byte_at_each_attempt_is_given_up(tmp_path: Path) -> None:
    with serve(*(Answer(CONTENT, cut=n) for n in (1, 1, 1, 1))) as server:
        assert "after 2 attempts without progress; 2 bytes are kept" in refusal(server.address, tmp_path / "x.part")


def test_a_slow_server_that_keeps_to_the_rate_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer in all than any of the limits."""
    monkeypatch.setattr("shards.common.http._CHUNK_BYTES", 768)

    def script(connection: socket.socket, closing: Any) -> None:
        connection.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(CONTENT))
        for start in range(0, len(CONTENT), 768):
            closing.wait(0.12)
            connection.sendall(CONTENT[start : start + 768])

    with raw_server(script) as server:
        fetch(server.address, tmp_path / "x.part", LIMITS._replace(least_rate=100, silence_seconds=0.4))
    assert (tmp_path / "x.part").read_bytes() == CONTENT and len(server.requests) == 1


def test_a_redirect_loop_ends_after_ten(tmp_path: Path) -> None:
    with raw_server(says(moved("/again"))) as server:
        assert "it redirects more than 10 times; check the address" in refusal(server.address, tmp_path / "x.part")
    assert len(server.requests) == 11


# Memory and disk


def test_the_body_of_a_redirect_is_neither_read_nor_inflated(tmp_path: Path) -> None:
    """50 MB that would be inflated, then an endless one."""
    bomb = gzip.compress(bytes(50_000_000))
    inflated = moved("/next", bomb).replace(b"Location", b"Content-Encoding: gzip\r\nLocation")
    endless = repeats(b"HTTP/1.1 302 Found\r\nLocation: /file\r\n\r\n", b"X" * 65536)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def script(connection: socket.socket, closing: Any) -> None:
        path = server.requests[-1].split()[1]
        answers = {"/scenes/": says(inflated), "/next": endless, "/file": says(OK + b"\r\n" + CONTENT)}
        answers[path](connection, closing)

    with raw_server(script) as server:
        fetch(server.address, tmp_path / "x.part", LIMITS)
    assert (tmp_path / "x.part").read_bytes() == CONTENT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


@pytest.mark.parametrize("headers", [b"", b"Content-Length: 999999999999\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_no_more_than_allowed_is_written_whatever_length_is_announced(headers: bytes, tmp_path: Path) -> None:
    body = b"10000\r\n" + bytes(65536) + b"\r\n" if b"chunked" in headers else bytes(65536)
    with raw_server(repeats(OK + headers + b"\r\n", body)) as server:
        line = refusal(server.address, tmp_path / "x.part")
    assert line == "x: the server sends more than the 10,000 bytes it may have"
    assert not (tmp_path / "x.part").exists() or (tmp_path / "x.part").stat().st_size <= 10_000


def test_a_continuation_cannot_make_the_file_larger(tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(CONTENT[:5000])
    (tmp_path / "x.part.json").write_text('{"validator": "\\"one\\"", "total": null}')
    with serve(Answer(CONTENT, headers={"Content-Range": "bytes 5000-7679/900000000"})) as server:
        assert "more than the 10,000 bytes" in refusal(server.address, tmp_path / "x.part")
    assert server.ranges == ["bytes=5000-"]
    assert (tmp_path / "x.part").read_bytes() == CONTENT[:5000]


def test_free_space_is_checked_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.common.http._ROOM_STEP_BYTES", 1 << 17)
    free = iter([1 << 20, 1 << 20, 1000])
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk._replace(free=next(free)))
    with raw_server(repeats(OK + b"\r\n", bytes(65536))) as server:
        line = refusal(server.address, tmp_path / "x.part", LIMITS._replace(most_bytes=1 << 30))
    assert line == f"no room at {tmp_path}: x takes about 131,072 bytes, 1,000 are free: make room"
    assert (tmp_path / "x.part").stat().st_size == 1 << 18


@pytest.mark.parametrize("etag", ['"' + "x" * 60_000 + '"', '"a\r\n b"', '"\xe9"'])
def test_an_odd_or_endless_etag_is_not_kept(etag: str, tmp_path: Path) -> None:
    answer = OK + b"ETag: " + etag.encode("latin-1") + b"\r\nContent-Length: 9000\r\n\r\nabc"
    with raw_server(says(answer)) as server:
        refusal(server.address, tmp_path / "x.part")
    assert (tmp_path / "x.part.json").read_text() == '{"validator":null,"total":9000}'
    assert "If-Range" not in server.requests[-1]


def test_endless_headers_are_an_error(tmp_path: Path) -> None:
    with raw_server(repeats(OK, b"A: b\r\n")) as server:
        assert "got more than 100 headers" in refusal(server.address, tmp_path / "x.part")


def link_or_fifo(kind: str, path: Path, elsewhere: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        path.hardlink_to(elsewhere)
    else:
        path.symlink_to(elsewhere)


@pytest.mark.parametrize("kind", ["fifo", "link", "hard link"])
def test_what_was_planted_under_the_names_of_a_download_is_replaced(kind: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"precious")
    link_or_fifo(kind, tmp_path / "x.part", mine)
    if kind == "fifo":
        link_or_fifo(kind, tmp_path / "x.part.json", mine)
    else:
        (tmp_path / "x.part.json").write_text('{"validator": "\\"one\\"", "total": 7680}')
    with serve(Answer(CONTENT)) as server:
        fetch(server.address, tmp_path / "x.part", LIMITS)
    status = (tmp_path / "x.part").lstat()
    assert stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and not status.st_mode & 0o022
    assert (tmp_path / "x.part").read_bytes() == CONTENT and mine.read_bytes() == b"precious"


# Redirects and credentials


@pytest.mark.parametrize(
    ("source", "location", "reason"),
    [
        ("https://a.org/x", "http://a.org/x", "from https to http"),
        ("https://a.org/x", "HTTP://a.org/x", "from https to http"),
        ("https://a.org/x", "file:///etc/passwd", "no address of http or https"),
        ("http://a.org/x", "gopher://a.org/x", "no address of http or https"),
        ("http://a.org/x", "http://[::1/x", "no address of http or https"),
        ("http://a.org/x", "http://a.org:99999/x?sig=s3cret", "no address of http or https"),
        ("http://a.org/x", "http://me:s3cret@a.org/x", "a user or password in it"),
    ],
)
def test_a_redirect_that_is_not_followed_is_told_without_its_target(source: str, location: str, reason: str) -> None:
    with pytest.raises(RedirectError, match=reason) as caught:
        _redirected(urlsplit(source), location)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/y?q#f", "https://a.org/y?q#f"),
        ("//b.org/y", "https://b.org/y"),
        ("y z", "https://a.org/y%20z"),
        ("https://[2001:db8::1]:8443/y", "https://[2001:db8::1]:8443/y"),
    ],
)
def test_other_redirects_are_followed(location: str, target: str) -> None:
    assert _redirected(urlsplit("https://a.org/x"), location).geturl() == target


@pytest.mark.parametrize(
    ("host", "reach"),
    [
        *((host, Reach.MACHINE) for host in ("127.0.0.1", "127.9.9.9", "::1", "169.254.169.254", "fe80::1%eth0")),
        *((host, Reach.MACHINE) for host in ("::ffff:127.0.0.1", "::ffff:169.254.1.1", "10.0.0.7", "8.8.8.7")),
        *((host, Reach.PRIVATE) for host in ("10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1")),
        *((host, Reach.PRIVATE) for host in ("fd00::1", "::ffff:10.0.0.1")),
        *((host, Reach.PUBLIC) for host in ("8.8.8.8", "2606:4700::1", "::ffff:8.8.8.8")),
    ],
)
def test_from_where_a_server_can_be_reached(host: str, reach: Reach) -> None:
    own = host if host.endswith(".7") else "10.0.0.7"
    assert Reach.of(host, own) == reach


@pytest.mark.parametrize(
    ("servers", "reason"),
    [
        ((Reach.PUBLIC, Reach.MACHINE), "it redirects to a service of this machine"),
        ((Reach.PRIVATE, Reach.MACHINE), "it redirects to a service of this machine"),
        ((Reach.PUBLIC, Reach.PRIVATE), "it redirects to a service of a private network, which it is not in"),
        ((Reach.MACHINE, Reach.PUBLIC), None),
        ((Reach.PRIVATE, Reach.PRIVATE), None),
    ],
)
def test_a_server_cannot_send_the_client_to_what_is_nearer_to_it(
    servers: tuple[Reach, Reach], reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raw_server(says(OK + b"\r\nsecret")) as inner, raw_server(says(moved(inner.address))) as server:
        fetch(server.address, tmp_path / "x.part", LIMITS)  # both are this machine's
        assert len(inner.requests) == 1
        answers = iter(servers)
        monkeypatch.setattr(Reach, "of", lambda *_: next(answers))
        if reason is None:
            fetch(server.address, tmp_path / "y.part", LIMITS)
        else:
            assert reason in refusal(server.address, tmp_path / "y.part")
    seen = 1 if reason else 2  # a connection that is refused is closed before a byte is sent
    assert len(list(filter(None, inner.requests))) == seen


def test_credentials_go_to_the_server_they_were_given_for(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    with raw_server(says(OK + b"\r\nx")) as other, raw_server(redirects_to(other)) as server:
        fetch(server.address, tmp_path / "x.part", LIMITS)
    own, same, foreign = server.requests[0], server.requests[1], other.requests[0]
    assert "Authorization: Basic bWU6czNjcmV0" in own and "Authorization: Basic bWU6czNjcmV0" in same
    assert "Authorization" not in foreign  # the same host, another port: another user's, perhaps


def test_where_a_redirect_leads_is_told_in_short_and_without_its_signature(tmp_path: Path) -> None:
    target = "/" + "x" * 50_000 + "\x1b[2J?sig=s3cret"
    answers = iter([moved(target), b"HTTP/1.1 404 no\r\n\r\n"])
    with raw_server(lambda connection, closing: connection.sendall(next(answers))) as server:
        line = refusal(server.address, tmp_path / "x.part")
    assert len(line) < 400 and line.isprintable() and "s3cret" not in line
    assert "the server answers 404 (Not Found)" in line


def redirects_to(other: RawServer) -> Script:
    answers = iter([moved("/same"), moved(other.address)])
    return lambda connection, closing: connection.sendall(next(answers))


@pytest.mark.parametrize(
    ("given", "target", "sent"),
    [
        ("http://a.org/", "https://a.org/x", True),
        ("http://a.org/", "http://a.org:80/x", True),
        ("https://a.org/", "https://A.org:443/x", True),
        ("http://a.org:81/", "https://a.org/x", False),
        ("https://a.org/", "https://a.org:444/x", False),
        ("https://a.org/", "https://b.org/x", False),
        ("https://a.org/", "https://a.org.b.org/x", False),
        ("https://a.org/", "http://a.org/x", False),
    ],
)
def test_which_server_is_the_same(given: str, target: str, sent: bool) -> None:
    assert http_request._is_same_origin(urlsplit(given), urlsplit(target)) is sent


def test_a_user_in_the_address_is_not_sent_to_others(tmp_path: Path) -> None:
    with raw_server(says(OK + b"\r\nx")) as other, raw_server(redirects_to(other)) as server:
        fetch(server.address.replace("//", "//me:s3cret@"), tmp_path / "x.part", LIMITS)
    assert "Authorization" in server.requests[1] and "Authorization" not in other.requests[0]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_an_ipv6_address_is_an_address(tmp_path: Path) -> None:
    with raw_server(says(OK + b"Content-Length: 1\r\n\r\nx"), host="::1") as server:
        fetch(server.address, tmp_path / "x.part", LIMITS)
    assert (tmp_path / "x.part").read_bytes() == b"x"


# LSUN
