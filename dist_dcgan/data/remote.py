"""The files of a data set from where they lie: another folder, a web server, or what a command prints."""

from __future__ import annotations

import errno
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from shards.errors import UserError

_SILENCE_SECONDS = 8.0
_ATTEMPTS = 5
"""With the pauses between them less than distributed.timeout_seconds, which ranks on other machines may wait."""
_CHUNK_BYTES = 1 << 20


class FailedError(Exception):
    """A file did not come; it may the next time. The text says why."""


class Remote(Protocol):
    """Where the files lie; as text, its name."""

    def fetch(self, name: str, path: Path) -> None:
        """Bring the file `name` to `path`; raises FailedError or, where another attempt is no use, UserError."""


class OtherFolder:
    """A folder of another file system, as one that a cluster shares."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def fetch(self, name: str, path: Path) -> None:
        """Copy the file."""
        try:
            with (self._folder / name).open("rb") as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, _CHUNK_BYTES)
        except FileNotFoundError:
            raise UserError(f"no {name} in {self._folder}") from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise FailedError(error.strerror) from None


class WebServer:
    """A folder on a web server; what was cut goes on where it was."""

    def __init__(self, address: str) -> None:
        """Raise UserError where the address holds a password: it would be in logs and configurations."""
        if "@" in urlsplit(address).netloc:
            raise UserError("an address of data with a user or password in it: put them into ~/.netrc")
        self._address = address.rstrip("/")

    def __str__(self) -> str:
        return self._address

    def fetch(self, name: str, path: Path) -> None:
        """Download the file."""
        from shards.transfer import Manner, fetch  # only here: who trains from a folder needs no HTTP

        fetch(f"{self._address}/{name}", path, Manner(_ATTEMPTS, _SILENCE_SECONDS, copies=1, shown=False))


class Command:
    """A shell command that prints the file whose name stands in place of `{}`."""

    def __init__(self, command: str) -> None:
        """Raise UserError where the command does not say where the name goes."""
        if "{}" not in command:
            raise UserError(f"no {{}} in pipe:{command}: it stands for a file's name, as in pipe:cat /mnt/data/{{}}")
        self._command = command

    def __str__(self) -> str:
        return f"pipe:{self._command}"

    def fetch(self, name: str, path: Path) -> None:
        """Write what the command prints."""
        from webdataset.gopen import gopen

        pipe = gopen("pipe:" + self._command.replace("{}", name), "rb")
        try:
            with path.open("wb") as file:
                while chunk := self._read(pipe.stream.fileno()):
                    file.write(chunk)
            if pipe.proc.wait(_SILENCE_SECONDS):
                raise FailedError(f"the command ends with status {pipe.proc.returncode}")
        except subprocess.TimeoutExpired:
            raise FailedError("the command does not end") from None
        finally:
            pipe.proc.kill()
            pipe.stream.close()
            pipe.proc.wait()

    def _read(self, descriptor: int) -> bytes:
        """Return the next bytes, none at the end."""
        if not select.select([descriptor], [], [], _SILENCE_SECONDS)[0]:
            raise FailedError(f"the command prints nothing for {_SILENCE_SECONDS:g} seconds")
        return os.read(descriptor, _CHUNK_BYTES)
