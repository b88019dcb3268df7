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
        """Open `path`, and create it as a file if it does not exist.

        It is then of this user and, if the umask lets the group write, of the group: who can only read a file could
        hold its lock for ever, too. Raises OSError for a link, a FIFO or a device.
        """
        self._path, self._taken = path, False
        self._descriptor, self._is_read_only = _opened(path)
        status = os.fstat(self._descriptor)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            os.close(self._descriptor)
            raise NotPlainError(errno.EINVAL, "not a plain file", str(path))
        is_own = status.st_uid == os.geteuid() and status.st_nlink == 1  # and no other file that was linked here
        if stat.S_ISREG(status.st_mode) and is_own:
            _keep_from_strangers(self._descriptor, stat.S_IMODE(status.st_mode))

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
            if (
                error.errno == errno.EBADF and self._is_read_only
            ):  # on NFS an exclusive lock needs a file that can be written
                raise self._not_writable() from None
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
        """Replace the content of the locked file; raises PermissionError if only reading it is allowed."""
        if self.read() == content:
            return
        if self._is_read_only:
            raise self._not_writable()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content.encode(), 0)

    def _not_writable(self) -> PermissionError:
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self._path))

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _opened(path: Path) -> tuple[int, bool]:
    """Return a descriptor, and whether this is a file that may only be read, which is enough to lock it."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_dir():
        return os.open(path, os.O_RDONLY | flags), False
    try:  # without O_CREAT, by which Linux refuses files of others in some folders
        return os.open(path, os.O_RDWR | flags), False
    except FileNotFoundError:  # nobody can only read it: 0600, or 0620 by the umask of a group
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o620), False
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags), True


def _keep_from_strangers(descriptor: int, mode: int) -> None:
    """Let only those open a lock file of this user that may write to it: the user, and the group if it is trusted."""
    wanted = 0o660 if mode & stat.S_IWGRP else 0o600
    if mode != wanted:
        with contextlib.suppress(OSError):  # the file system keeps no permissions
            os.fchmod(descriptor, wanted)
