"""Open paths that may not be regular files."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotPlainError(OSError):
    """The path is a FIFO, device, socket or folder, not a regular file."""


def open_plain(path: bytes | Path) -> BinaryIO:
    """Open a regular file for reading; raises OSError, NotPlainError if it is something else.

    Opening a FIFO would block, and opening a device may have side effects.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotPlainError(errno.EINVAL, "not a plain file")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # files below /proc may block, too
    return open(descriptor, "rb", buffering=0)
