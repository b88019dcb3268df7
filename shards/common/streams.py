"""Standard output and standard error that never stop a command whose result is something else.

Their reader may exit (`| head`), stop reading (`| less`), or be a terminal that is closed; the disk of a log may be
full; they may be closed from the start.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from shards.common.errors import UserError
from shards.common.redaction import printable, without_secrets

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""Errors of a stream that will never work again: its reader has exited, its terminal was closed."""
_SLOW_MS = 1000
_CHUNK = select.PIPE_BUF
"""Bytes that a pipe takes without blocking if it is ready."""


class Stream(io.RawIOBase):
    """A file descriptor that may fail: what cannot be written is dropped, and counted.

    While `is_result`, it fails as streams usually do: it waits for its reader, ends the process if the reader has
    exited, and raises UserError if the disk is full.
    """

    def __init__(self, descriptor: int, is_result: bool) -> None:
        self._descriptor, self.is_result = descriptor, is_result
        self._gone, self._dropped, self._reason = False, 0, ""

    def writable(self) -> bool:
        """Return True."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        """Write the first bytes of `data`; return the number of bytes written or dropped."""
        if self._gone:
            return len(data)
        if not self.is_result and not self._is_ready():
            return self._drop(len(data), "its reader is slow")
        try:
            if self._dropped and not self.is_result:
                os.write(self._descriptor, f"[{self._dropped:,} bytes are missing here: {self._reason}]\n".encode())
                self._dropped = 0
            return os.write(self._descriptor, memoryview(data)[: None if self.is_result else _CHUNK])
        except OSError as error:
            if error.errno in _GONE or self.is_result:
                self._abandon()
            if self.is_result:
                _end_without(error)
            return self._drop(len(data), os.strerror(error.errno or errno.EIO))

    def _is_ready(self) -> bool:
        ready = select.poll()
        ready.register(self._descriptor, select.POLLOUT)
        return bool(ready.poll(0 if self._dropped else _SLOW_MS))

    def _drop(self, count: int, reason: str) -> int:
        if not self._dropped and self._descriptor == 1:
            print(f"warning: going on without standard output: {reason}", file=sys.stderr)
        self._dropped, self._reason = self._dropped + count, reason
        return count

    def _abandon(self) -> None:
        """Drop everything from now on, also what other code and child processes write."""
        self._gone = True
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._descriptor)
            os.close(nowhere)


class Text(io.TextIOWrapper):
    """Text layer of a stream, through which tracebacks and libraries print, too: redacted and escaped.

    Lines are kept, as here nothing tells one that a name contains from one that is meant: `messages` does.
    """

    def write(self, text: str, /) -> int:
        """Write a text, redacted and escaped."""
        super().write(printable(without_secrets(text), kept="\n\r\t"))
        return len(text)


def _end_without(error: OSError) -> None:
    """End a command whose output is its result, and cannot be written."""
    if error.errno == errno.EPIPE:
        sys.exit(0)  # the reader has seen what it wanted, as with `| head`
    raise UserError(f"cannot write to standard output ({error.strerror}): redirect it to another place") from None


def guard_streams() -> None:
    """Have the standard streams of this process outlive their readers and disks, also if they are closed now.

    Standard output is taken for the command's result until `output_is_optional`.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened gets its number, and what is printed
            assert os.open(os.devnull, os.O_RDWR) == number
    sys.stdout = _guarded(sys.stdout, sys.__stdout__, Stream(1, is_result=True))
    sys.stderr = _guarded(sys.stderr, sys.__stderr__, Stream(2, is_result=False))


def output_is_optional() -> None:
    """Go on without standard output if it fails from now on: the command's result is something else."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(raw, Stream):
        raw.is_result = False


def _guarded(stream: TextIO | None, original: TextIO | None, guarded: Stream) -> TextIO:
    if stream is not None and stream is not original:
        return stream  # of code that calls commands in its own process
    encoding = stream.encoding if stream is not None else "utf-8"
    # backslashreplace: a path need not be UTF-8
    return Text(io.BufferedWriter(guarded), encoding, errors="backslashreplace", line_buffering=True)
