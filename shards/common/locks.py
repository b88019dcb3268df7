"""Locks between processes, on files and folders."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from types import TracebackType

from shards.common.files import NotPlainError, is_unsupported

_MOST_BYTES = 1 << 12


class NoLocksError(OSError):
    """The file system has no locks, such as Lustre without its flock option, or none for folders, such as NFS."""


class Lock:
    """The operating system's lock on a file or folder; it is taken at once or not, and ends with its process.

    Two `Lock`s exclude each other even in one process.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, and create it as a file with mode 0600 if it does not exist.

        Raises OSError for a link, a FIFO or a device.
        """
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        self._path, self._taken = path, False
        self._descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        kind = os.fstat(self._descriptor).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            os.close(self._descriptor)
            raise NotPlainError(errno.EINVAL, "not a plain file", str(path))

    def take(self, *, shared: bool = False) -> bool:
        """Lock, or change the kind of the lock; return False if another holds it in a way that excludes this.

        In that case nothing is held afterwards. Raises NoLocksError if the file system has no locks.
        """
        self.release()  # on NFS a lock that cannot be converted stays
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if is_unsupported(error) or error.errno == errno.ENOLCK:
                raise NoLocksError(error.errno, "the file system has no locks", str(self._path)) from None
            raise
        self._taken = True
        return True

    def release(self) -> None:
        """Unlock, also for forked processes that share the open file."""
        if self._taken:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._taken = False

    def close(self) -> None:
        """Unlock and close the file, which is not removed."""
        with contextlib.suppress(OSError):  # the server is gone; closing the file unlocks it, too
            self.release()
        os.close(self._descriptor)

    def read(self) -> str:
        """Return the content of the locked file, at most 4 KiB of it."""
        return os.pread(self._descriptor, _MOST_BYTES, 0).decode(errors="replace")

    def write(self, content: str) -> None:
        """Replace the content of the locked file."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content.encode(), 0)

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
