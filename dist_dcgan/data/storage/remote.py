"""The files of a data set from where they lie: another folder, a web server, or what a command prints."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from shards.common.errors import UserError

_SILENCE_SECONDS = 5.0
_ATTEMPTS = 5
_LONGEST_PAUSE_SECONDS = 8.0
"""Given up after some 40 seconds of nothing, before other ranks have waited for distributed.timeout_seconds."""
_CHUNK_BYTES = 1 << 20


class FailedError(Exception):
    """A file did not come; it may the next time. The text says why."""


class Remote(Protocol):
    """Where the files lie; as text, its name."""

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Bring the file `name` to `path`; raises FailedError or, where another attempt is no use, UserError.

        More than `most_bytes` is refused before it fills the disk.
        """


class OtherFolder:
    """A folder of another file system, as one that a cluster shares."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Copy the file."""
        try:
            with (self._folder / name).open("rb") as source, path.open("wb") as copy:
                if os.fstat(source.fileno()).st_size > most_bytes:
                    raise FailedError(f"it has more than {most_bytes:,} bytes")
                shutil.copyfileobj(source, copy, _CHUNK_BYTES)
        except FileNotFoundError:
            raise UserError(f"no {name} in {self._folder}") from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise FailedError(error.strerror or str(error)) from None


class WebServer:
    """A folder on a web server; what was cut goes on where it was."""

    def __init__(self, address: str) -> None:
        """Raise UserError where the address holds a password: it would be in logs and configurations."""
        try:
            netloc = urlsplit(address).netloc
        except ValueError as error:
            raise UserError(f"{address} is no address: {error}") from None
        if "@" in netloc:
            raise UserError("an address of data with a user or password in it: put them into ~/.netrc")
        self._address = address.rstrip("/")

    def __str__(self) -> str:
        return self._address

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Download the file."""
        from shards.common.http import FetchOptions, fetch  # only here: who trains from a folder needs no HTTP

        options = FetchOptions(
            attempts=_ATTEMPTS,
            silence_seconds=_SILENCE_SECONDS,
            copies=1,
            shown=False,
            longest_pause_seconds=_LONGEST_PAUSE_SECONDS,
            most_bytes=most_bytes,
            kept=False,
        )
        fetch(f"{self._address}/{name}", path, options)


class Command:
    """A shell command that prints the file whose name stands in place of `{}`."""

    def __init__(self, command: str) -> None:
        """Raise UserError where the command does not say where the name goes."""
        if "\0" in command:
            raise UserError("a command of data with a NUL in it")
        if "{}" not in command:
            raise UserError(f"no {{}} in pipe:{command}: it stands for a file's name, as in pipe:cat /mnt/data/{{}}")
        self._command = command

    def __str__(self) -> str:
        return f"pipe:{self._command}"

    def fetch(self, name: str, path: Path, most_bytes: int) -> None:
        """Write what the command prints."""
        command = self._command.replace("{}", name)
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)  # as asked for
        assert process.stdout is not None
        written = 0
        try:
            with process.stdout as output, path.open("wb") as file:
                while chunk := _next_bytes(output.fileno()):
                    written += len(chunk)
                    if written > most_bytes:
                        raise FailedError(f"the command prints more than {most_bytes:,} bytes")
                    file.write(chunk)
            if process.wait(_SILENCE_SECONDS):
                raise FailedError(f"the command ends with status {process.returncode}")
        except subprocess.TimeoutExpired:
            raise FailedError("the command does not end") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()


def _next_bytes(descriptor: int) -> bytes:
    """Return the next bytes of a pipe, none at its end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(1000 * _SILENCE_SECONDS):
        raise FailedError(f"the command prints nothing for {_SILENCE_SECONDS:g} seconds")
    return os.read(descriptor, _CHUNK_BYTES)
