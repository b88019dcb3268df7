"""Atomic and durable writes, reads of regular files only, hashes and free space.

What a file system cannot do, such as fsync of a folder, is left out; what fails is raised.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.common.errors import UserError

_UNSUPPORTED = frozenset({errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def is_unsupported(error: OSError) -> bool:
    """Return whether the file system does not have an operation, in contrast to one that failed (EIO, ENOSPC).

    It is meant for calls with valid arguments: for them EINVAL and EBADF say "not for such a file", as CIFS and NFS do.
    """
    return error.errno in _UNSUPPORTED


def publish(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that is renamed to `path` when the block ends, and deleted if the block raises.

    Until then it is `path` + `.tmp`, which remains only if the process is killed. If not `durable`, the file
    is not fsynced: a power failure may truncate it until the caller syncs the disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                sync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


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


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, unless its file system cannot; raises OSError if that fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_unsupported(error):
            raise


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable, as `sync` does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def link_or_rename(part: Path, path: Path) -> None:
    """Give the file `part` the name `path`; raises FileExistsError if that is taken, and `part` then stays.

    On a file system without hard links, a file at `path` is replaced.
    """
    try:
        os.link(part, path)
    except OSError as error:
        if not (is_unsupported(error) or error.errno in (errno.EPERM, errno.EXDEV)):  # what FAT and AFS answer
            raise
        part.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb", buffering=0) as file:
        return content_sha256(file)


def content_sha256(file: BinaryIO) -> str:
    """Return the SHA-256, in hex, of an open file from its current position on."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def state_of(path: Path) -> tuple[str, int, int]:
    """Return a file's resolved path in hex, size in bytes and mtime in ns; raises UserError if it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return os.fsencode(path.resolve()).hex(), status.st_size, status.st_mtime_ns


def check_room(directory: Path, required_bytes: int, purpose: str, remedy: str = "") -> None:
    """Raise UserError if the disk of `directory`, which may not exist yet, is too full; `purpose` says what for.

    A disk that does not tell its space passes.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    space = disk_space(existing)
    if space is not None and space.free < required_bytes:
        raise UserError(f"no room at {directory}: {purpose} {required_bytes:,} bytes, {space.free:,} are free{remedy}")


class DiskSpace(NamedTuple):
    """Size of a disk, and what is free on it, in bytes."""

    total: int
    free: int


def disk_space(path: Path) -> DiskSpace | None:
    """Return the space of the disk of `path`, None if its file system does not tell: some report a total of 0."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        if is_unsupported(error):
            return None
        raise
    return DiskSpace(usage.total, usage.free) if usage.total else None
