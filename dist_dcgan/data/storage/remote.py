"""Fetches files of a data set from another folder, a web server or a command's output."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import urlsplit

from shards.common.errors import UserError
from shards.common.files import NotPlainError, open_plain
from shards.common.messages import tell
from shards.common.redaction import HIDDEN_COMMAND, public_address

_SILENCE_SECONDS = 5.0
_ATTEMPTS = 5
_LONGEST_PAUSE_SECONDS = 8.0
"""The limits end a transfer after about 40 seconds of silence, before distributed.timeout_seconds (60 by default)."""
_START_FACTOR = 3
"""A command may be silent for so many times longer before its first byte, as interpreters take seconds to start."""
_LEAST_RATE = 10_000.0
"""Bytes per second; below an image of 64x64 pixels a second, a source is as useless as a silent one."""
_CHUNK_BYTES = 1 << 20
_LONGEST_REPORT = 10_000


class FailedError(Exception):
    """A transfer failed and may be tried again. The text says why."""


class Remote(Protocol):
    """Source of files; `str` returns its name."""

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Fetch the file `name` to `path`; raises FailedError, or UserError if another attempt is useless.

        A file of more than `most_bytes` is refused before it fills the disk.
        """


class OtherFolder:
    """A folder on another file system, such as one that a cluster shares."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Copy the file."""
        copy(self._folder / name, path, most_bytes)


def copy(source: Path, path: Path, most_bytes: int) -> None:
    """Copy a regular file to the new file `path`, not more than `most_bytes` of it; raises as `Remote.fetch` does."""
    try:
        file = open_plain(source)
    except FileNotFoundError:
        raise UserError(f"no {source.name} in {source.parent}") from None
    except NotPlainError:
        raise FailedError("it is not a plain file") from None
    except OSError as error:
        raise FailedError(error.strerror or str(error)) from None
    try:
        with file, path.open("xb") as out:
            if os.fstat(file.fileno()).st_size > most_bytes:
                raise FailedError(f"it has more than {most_bytes:,} bytes")
            while most_bytes and (chunk := file.read(min(_CHUNK_BYTES, most_bytes))):  # it may grow meanwhile
                out.write(chunk)
                most_bytes -= len(chunk)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has gone: nobody may remove it meanwhile") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise FailedError(error.strerror or str(error)) from None


class WebServer:
    """A folder on a web server; an interrupted download resumes.

    The query of its address, such as a signature, is sent with every file's name, and never shown.
    """

    def __init__(self, address: str) -> None:
        """Raise UserError if the address contains a password: it would appear in logs and configurations."""
        try:
            netloc = urlsplit(address).netloc
        except ValueError as error:
            raise UserError(f"{public_address(address)} is no address: {error}") from None
        if "@" in netloc:
            raise UserError("an address of data with a user or password in it: put them into ~/.netrc")
        self._address = address

    def __str__(self) -> str:
        return public_address(self._address).rstrip("/")

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Download the file."""
        from shards.common.http import FetchOptions, fetch, file_address  # only here: a local folder needs no HTTP

        options = FetchOptions(
            most_bytes,
            attempts=_ATTEMPTS,
            silence_seconds=_SILENCE_SECONDS,
            least_rate=_LEAST_RATE,
            copies=1,
            shown=False,
            longest_pause_seconds=_LONGEST_PAUSE_SECONDS,
            kept=False,
        )
        fetch(file_address(self._address, name), path, options)


class Command:
    """A shell command that prints the file whose name replaces `{}`."""

    def __init__(self, command: str) -> None:
        """Raise UserError if the command has no `{}` for the name."""
        if "\0" in command:
            raise UserError("a command of data with a NUL in it")
        if "{}" not in command:
            raise UserError(f"no {{}} in {HIDDEN_COMMAND}: it stands for a file's name, as in `cat /mnt/data/{{}}`")
        self._command = command

    def __str__(self) -> str:
        return HIDDEN_COMMAND

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Write the command's output; print its standard error, which may repeat its arguments, redacted."""
        with tempfile.TemporaryFile() as errors:
            try:
                self._fetch(name, path, most_bytes, errors)
            finally:
                errors.seek(max(0, errors.seek(0, os.SEEK_END) - _LONGEST_REPORT))
                for line in errors.read().decode(errors="backslashreplace").splitlines():
                    tell(f"{self}: {line}")

    def _fetch(self, name: str, path: Path, most_bytes: int, errors: IO[bytes]) -> None:
        command = self._command.replace("{}", name)
        process = subprocess.Popen(  # user's own
            command, shell=True, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        assert process.stdout is not None
        written, started, patience = 0, time.monotonic(), _START_FACTOR * _SILENCE_SECONDS
        try:
            with process.stdout as output, path.open("xb") as file:
                while chunk := _next_bytes(output.fileno(), patience):
                    if not written:
                        started, patience = time.monotonic(), _SILENCE_SECONDS
                    written += len(chunk)
                    if written < _LEAST_RATE * (time.monotonic() - started - 2 * _SILENCE_SECONDS):
                        raise FailedError(f"the command prints less than {_LEAST_RATE:,.0f} bytes a second")
                    if written > most_bytes:
                        raise FailedError(f"the command prints more than {most_bytes:,} bytes")
                    file.write(chunk)
            if process.wait(_SILENCE_SECONDS):
                raise FailedError(f"the command ends with status {process.returncode}")
        except subprocess.TimeoutExpired:
            raise FailedError("the command does not end") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children
                process.wait()


def _next_bytes(descriptor: int, seconds: float) -> bytes:
    """Return the next bytes of a pipe, for which `seconds` may be waited; empty at its end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(1000 * seconds):
        raise FailedError(f"the command prints nothing for {seconds:g} seconds")
    return os.read(descriptor, _CHUNK_BYTES)
