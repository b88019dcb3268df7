"""The log file metrics.jsonl, from which all other logs can be made again."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from dist_dcgan.loggers.base import Logger, Row
from dist_dcgan.run.history import MOST_BYTES
from shards.common.files import atomic_file, open_in_place
from shards.common.messages import warn

_MOST_LINE_BYTES = 1 << 20


class JsonlLogger(Logger):
    """Appends a line per row to metrics.jsonl, after removing rows after `step`.

    While the disk fails, lines are kept in memory: each call tries to append all of them, whole lines or nothing. The
    file is changed in place, and so no link is followed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._size = _cut(path, step) if os.path.lexists(path) else 0
        self._file: BinaryIO | None = None
        self._unwritten = b""

    def metrics(self, row: Row) -> None:
        """Append the row; values that are not finite become null, as JSON has no infinity. Raises OSError."""
        self._append({key: value if math.isfinite(value) else None for key, value in row.items()})

    def alert(self, step: int, text: str) -> None:
        """Append a row with the step and the message; raises OSError."""
        self._append({"step": step, "alert": text})

    def close(self) -> None:
        """Try the disk a last time, and close the file."""
        try:
            self._write()
            self._close()
        except OSError as error:  # NFS may report a full disk only as the file is closed
            warn(f"{self._path} may lack its last rows: {error.strerror or error}")

    def _append(self, row: Mapping[str, object]) -> None:
        self._unwritten += (json.dumps(row) + "\n").encode()
        self._write()

    def _write(self) -> None:
        """Write at the end of the last whole line, so that what a failed attempt has left there is replaced."""
        try:
            if self._file is None:
                self._file = open_in_place(self._path)
                found = os.fstat(self._file.fileno()).st_size
                self._size = min(self._size, found)  # else zeros would precede the rows of a new file
            written = 0
            while written < len(self._unwritten):
                written += os.pwrite(self._file.fileno(), self._unwritten[written:], self._size + written)
        except OSError:
            self._give_up()
            raise
        self._size, self._unwritten = self._size + len(self._unwritten), b""

    def _give_up(self) -> None:
        """Remove what is left of an attempt, and close the file, whose descriptor a restarted server may not know."""
        with contextlib.suppress(OSError), open_in_place(self._path) as file:  # else the next attempt overwrites it
            if os.fstat(file.fileno()).st_size > self._size:
                os.ftruncate(file.fileno(), self._size)
        with contextlib.suppress(OSError):
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _cut(path: Path, step: int) -> int:
    """Remove the rows after `step` from a log, and return its size; it needs no room unless a line is incomplete.

    The log may come from anybody: it takes the memory of a line, and the time to read `MOST_BYTES`. Raises OSError.
    """
    with open_in_place(path) as file:
        found = os.fstat(file.fileno()).st_size
        if found > MOST_BYTES:
            raise OSError(errno.EFBIG, f"larger than {MOST_BYTES:,} bytes", str(path))
        size, is_beginning = 0, True
        for position, line in _rows(file, step):
            is_beginning = is_beginning and position == size
            size += len(line)
        if is_beginning and size <= found:
            os.ftruncate(file.fileno(), size)
        else:
            with atomic_file(path) as rows:
                rows.writelines(line for _, line in _rows(file, step))
    return size


def _rows(file: BinaryIO, step: int) -> Iterator[tuple[int, bytes]]:
    """Yield the rows up to `step`, each with its position; no row is longer than `_MOST_LINE_BYTES`."""
    position = file.seek(0)
    while line := file.readline(_MOST_LINE_BYTES):
        if _step_of(line) <= step:
            yield position, line if line.endswith(b"\n") else line + b"\n"
        position += len(line)


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")  # the incomplete last line of a killed process
