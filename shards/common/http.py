"""Download one file over HTTP, resuming after a cut and never mixing two versions of the file.

The server is not trusted: sizes, times and redirects have limits from the first byte on.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from http.client import IncompleteRead
from pathlib import Path
from time import monotonic, sleep
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

import requests
from pydantic import ValidationError
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from shards.common.command_line import Options
from shards.common.errors import UserError
from shards.common.files import NotPlainError, check_room, open_in_place, open_plain, publish, remove_leftovers
from shards.common.http_request import Guard, get
from shards.common.messages import tell
from shards.common.ownership import Ownership
from shards.common.progress import Progress
from shards.common.redaction import one_line, public_address

_CONNECT_SECONDS = 15.0
_LONGEST_WAIT_SECONDS = 60.0
_CHUNK_BYTES = 1 << 16
"""A timeout inside a chunk loses its bytes, so chunks are only as large as speed needs."""

_ROOM_STEP_BYTES = 1 << 26
"""The free space of the disk is checked whenever as much was written."""
_MOST_VERSION_BYTES = 1 << 16
_MOST_SHOWN = 200
"""Characters of a server that a message has at most."""

_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,200}"')
_DATE = re.compile(r"[A-Za-z0-9:, +-]{1,100}")
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/(?:([0-9]{1,18})|\*)")


class Version(Options):
    """Version of the server's file that a partial download belongs to."""

    validator: str | None
    """Strong ETag, else Last-Modified; without either the download cannot be resumed."""
    total: int | None
    """Length of the file in bytes, if known."""


class FetchOptions(NamedTuple):
    """Options of `fetch`."""

    most_bytes: int
    """Largest size accepted, in bytes."""
    attempts: int = 8
    """Attempts in a row without progress before giving up; eight take about two minutes."""
    silence_seconds: float = 60.0
    """Read timeout in seconds."""
    least_rate: float = 1_000.0
    """Bytes per second below which an attempt ends, over twice the read timeout, and does not count as progress."""
    copies: int = 2
    """Free disk space required, in multiples of the file's size: 2 if it is unpacked next to itself."""
    shown: bool = True
    """Whether progress is shown."""
    longest_pause_seconds: float = 300.0
    """Longest pause before another attempt, even if the server asks for more."""
    kept: bool = True
    """Whether the error message may promise that received bytes are kept."""


class TransferError(Exception):
    """A failed attempt that may be retried; the message is the reason."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def fetch(address: str, part: Path, options: FetchOptions) -> None:
    """Download the file at `address` to `part`, resuming what an earlier call or process left there.

    Raises UserError if the server refuses, if `options.attempts` attempts in a row bring no progress, if the file has
    more than `options.most_bytes` or the disk no room; OSError if the disk fails. Received bytes are kept.
    """
    _discard_if_foreign(part)
    failures, reached = 0, _size(part)
    while not _is_complete(part):
        started = monotonic()
        try:
            _attempt(address, part, options)
            return
        except TransferError as error:
            # Progress is a new maximum: a server that always restarts from byte 0 must fail in the end
            required = options.least_rate * max(1.0, monotonic() - started)
            failures = 0 if _size(part) - reached >= required else failures + 1
            reached = max(reached, _size(part))
            if failures == options.attempts:
                raise UserError(_given_up(address, part, str(error), options)) from None
            _wait(error, failures, part.stem, options.longest_pause_seconds)


def file_address(folder: str, name: str) -> str:
    """Return the address of a file in a folder, whose address may have a query, such as a signature."""
    address = urlsplit(folder)
    return address._replace(path=f"{address.path.rstrip('/')}/{name}", fragment="").geturl()


def discard(part: Path) -> None:
    """Remove `part` and its version file."""
    part.unlink(missing_ok=True)  # first: bytes without a version are never used, a version without bytes is harmless
    _version_path(part).unlink(missing_ok=True)
    remove_leftovers(part.parent, _version_path(part).name.__eq__)


def _discard_if_foreign(part: Path) -> None:
    """Remove a `part` that others could change after it is checked, or that is no file, such as a link or a FIFO."""
    if os.path.lexists(part):
        status = part.lstat()
        if status.st_nlink != 1 or not Ownership.on_disk_of(part.parent).belongs(status):
            discard(part)


def _attempt(address: str, part: Path, options: FetchOptions) -> None:
    """Download the missing bytes in one request; raises TransferError if it fails or ends too early."""
    held, headers, failure = _read_version(part), {}, None
    offset = _size(part) if held else 0
    if held and held.validator and offset:
        headers = {"Range": f"bytes={offset}-", "If-Range": held.validator}
    with Guard(2 * options.silence_seconds) as guard:
        try:
            with _ask(address, headers, guard, options) as response:
                _receive(response, part, held if headers else None, offset, guard, options)
        except (requests.RequestException, HTTPError) as error:
            failure = TransferError(_cause(error))
        except TransferError as error:
            failure = error
    if guard.expired:  # in a body without a length, that looks like its end
        failure = TransferError(f"the server sends less than {options.least_rate:,.0f} bytes a second")
    if failure is not None:
        raise failure


def _ask(address: str, headers: Mapping[str, str], guard: Guard, options: FetchOptions) -> requests.Response:
    """Send a request; raises UserError if the address is not a valid HTTP address or a redirect is not followed."""
    try:
        return get(address, headers, guard, min(_CONNECT_SECONDS, options.silence_seconds), options.silence_seconds)
    except ValueError as error:  # requests' own errors of this kind are ValueErrors
        raise UserError(f"cannot get {public_address(address)}: {_cause(error)}; check the address") from None
    except OSError as error:
        if isinstance(error, requests.RequestException):
            raise
        raise UserError(f"cannot get {public_address(address)}: {_certificates()}{_cause(error)}") from None


def _certificates() -> str:
    """Return the variable that names the file of certificates, with a remedy; an empty string if none is set."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # in requests' order
        if os.environ.get(name):
            return f"{name}={os.environ[name]} has to name a file of certificates, or be unset: "
    return ""


def _receive(
    response: requests.Response, part: Path, held: Version | None, offset: int, guard: Guard, options: FetchOptions
) -> None:
    """Append the response to the first `offset` bytes of the version `held`, or write the whole file again."""
    if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and held:
        if held.total in (None, offset) and _content_range(response) == (None, offset):
            return  # the file was complete, but its length unknown
        discard(part)
        raise TransferError("the file on the server changed: starting again")
    if response.status_code == HTTPStatus.PARTIAL_CONTENT and held:
        total = _check_continuation(response, part, held, offset)
    elif response.status_code == HTTPStatus.OK:
        total, offset = _start_again(response, part), 0
    else:
        raise _refusal(response)
    if total is not None and total > options.most_bytes:
        raise _too_large(part, options)
    _require_room(part, offset, total, options)
    _write(response, part, offset, total, guard, options)


def _check_continuation(response: requests.Response, part: Path, held: Version, offset: int) -> int | None:
    """Return the file's length; if the response does not continue `part`, discard it and raise TransferError."""
    start, total = _content_range(response)
    header = "ETag" if str(held.validator).startswith('"') else "Last-Modified"
    same_version = response.headers.get(header, held.validator) == held.validator
    same_length = total == held.total or None in (total, held.total)
    if start != offset or not same_version or not same_length:
        discard(part)
        raise TransferError("the server answers with another range or file than was asked for: starting again")
    return held.total if total is None else total


def _start_again(response: requests.Response, part: Path) -> int | None:
    """Discard `part`, record the new version and return its length, None if unknown."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
    etag, date = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
    # Weak ETags do not identify bytes; what is long or odd is not sent back
    validator = etag if _STRONG_ETAG.fullmatch(etag) else date if _DATE.fullmatch(date) else None
    discard(part)
    publish(_version_path(part), Version(validator=validator, total=total).model_dump_json().encode())
    return total


def _write(
    response: requests.Response, part: Path, offset: int, total: int | None, guard: Guard, options: FetchOptions
) -> None:
    """Append the body; raises TransferError if it is shorter or longer than the announced `total`."""
    done, room_until = offset, offset + _ROOM_STEP_BYTES
    most_bytes = options.most_bytes if total is None else total
    guard.require(options.least_rate, over_seconds=2 * options.silence_seconds)
    with _open(part) as file, Progress(total, part.stem, unit="B", start=offset, shown=options.shown) as progress:
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
            if done >= room_until:
                _require_room(part, done, total, options)
                room_until = done + _ROOM_STEP_BYTES
            done += len(chunk)
            if done > most_bytes:
                break
            file.write(chunk)
            guard.advance(len(chunk))
            progress.advance(len(chunk))
    if done > most_bytes and total is None:
        raise _too_large(part, options)
    if done > most_bytes:
        discard(part)
        raise TransferError(f"the server sends more than the {total:,} bytes that it announced")
    if total is not None and done < total:
        raise TransferError(f"the server sent {done:,} of {total:,} bytes")


def _open(part: Path) -> BinaryIO:
    """Open `part` to append to it, and let only this user write; raises OSError if it is a link."""
    file = open_in_place(part)
    with suppress(OSError):  # file systems without permissions
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & ~0o022)
    file.seek(0, os.SEEK_END)
    return file


def _require_room(part: Path, done: int, total: int | None, options: FetchOptions) -> None:
    """Raise UserError if the disk has no room for the rest: others may fill it meanwhile."""
    required = options.copies * (_ROOM_STEP_BYTES if total is None else total) - (0 if total is None else done)
    unpacked = ", unpacked," * (options.copies > 1)
    check_room(part.parent, required, f"{part.stem}{unpacked} takes about")


def _too_large(part: Path, options: FetchOptions) -> UserError:
    return UserError(f"{part.stem}: the server sends more than the {options.most_bytes:,} bytes it may have")


def _refusal(response: requests.Response) -> Exception:
    """Return the error for an HTTP status without a file."""
    status = response.status_code
    phrase = next((known.phrase for known in HTTPStatus if known == status), "no known status")
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= 500:
        return TransferError(f"the server answers {status} ({phrase})", _retry_after(response))
    signed = ", and its signature, which may have expired" if urlsplit(response.url).query else ""
    name = public_address(response.url)[:_MOST_SHOWN]  # a redirect may lead to an address of any length
    return UserError(f"cannot get {name}: the server answers {status} ({phrase}); check the address{signed}")


def _retry_after(response: requests.Response) -> float:
    try:
        return Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
    except (HTTPError, ValueError, OverflowError):
        return 0.0


def _wait(error: TransferError, failures: int, name: str, longest: float) -> None:
    seconds = min(max(min(2.0 ** max(failures - 1, 0), _LONGEST_WAIT_SECONDS), error.retry_after), longest)
    tell(f"{name}: {error}; trying again in {seconds:.0f} s")
    sleep(seconds)


def _given_up(address: str, part: Path, reason: str, options: FetchOptions) -> str:
    arrived = _size(part) if options.kept else 0
    rest = f"{arrived:,} bytes are kept, the same command goes on" if arrived else "the same command tries again"
    return f"cannot get {public_address(address)}: {reason}, after {options.attempts} attempts without progress; {rest}"


def _cause(error: BaseException) -> str:
    """Return the innermost of an HTTP library's chained errors as one printable line of at most 200 characters."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, IncompleteRead):
        return "the connection was cut"
    return one_line(getattr(error, "strerror", None) or error)[:_MOST_SHOWN]


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """Return the start of the body in the file and the file's length, each None if unknown."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start, total = match.groups() if match else (None, None)
    return None if start is None else int(start), None if total is None else int(total)


def _is_complete(part: Path) -> bool:
    version = _read_version(part)
    return version is not None and part.exists() and _size(part) == version.total


def _read_version(part: Path) -> Version | None:
    try:
        with open_plain(_version_path(part)) as file:
            return Version.model_validate_json(file.read(_MOST_VERSION_BYTES))
    except (FileNotFoundError, NotPlainError, ValidationError):
        return None


def _version_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
