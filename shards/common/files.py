"""Files that are whole and durable or not there."""

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
    """Open a file that appears at `path`, whole and durable, when the block ends, and not where it raises.

    Until then it is `path` + `.tmp`, which only a killed process leaves behind. Without `durable` it is whole
    for every process, but a power failure may still cut it short until the caller syncs the disk.
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
    """Make a rename in `directory` durable."""
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
    """Return the place, size and time of change of a file, as JSON knows them; raises UserError where it is gone."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return os.fsencode(path.resolve()).hex(), status.st_size, status.st_mtime_ns


def check_room(directory: Path, required_bytes: int, purpose: str) -> None:
    """Raise UserError where the disk of `directory`, which may not exist yet, has no room; `purpose` is what for."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < required_bytes:
        raise UserError(f"no room at {directory}: {purpose} {required_bytes:,} bytes, {free:,} are free")
