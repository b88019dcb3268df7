"""Atomic and durable writes, hashes and free space of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards.common.errors import UserError


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
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable by fsync."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
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


def check_room(directory: Path, required_bytes: int, purpose: str) -> None:
    """Raise UserError if the disk of `directory`, which may not exist yet, is too full; `purpose` says what for."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < required_bytes:
        raise UserError(f"no room at {directory}: {purpose} {required_bytes:,} bytes, {free:,} are free")
