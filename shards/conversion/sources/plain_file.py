"""Opening what may be no file at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotPlainError(OSError):
    """A FIFO, a device, a socket or a folder stands where a file should."""


def open_plain(path: bytes | Path) -> BinaryIO:
    """Open a plain file for reading; raises OSError where it is none.

    Opening a FIFO would wait for its writer, and opening a device may do anything.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotPlainError(errno.EINVAL, "not a plain file")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # files below /proc may wait, too
    return open(descriptor, "rb", buffering=0)
