"""Locations of a data set, and the check of a shard's file against the manifest: size and SHA-256."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from shards.common.errors import UserError
from shards.common.files import content_sha256, open_plain
from shards.manifest import Manifest, ShardEntry, check_files, read_manifest


class FileState(NamedTuple):
    """Identity of a file; differs if the file was replaced or written to.

    A file's owner can make a changed file look the same; no other user can.
    """

    inode: int
    size: int
    changed_ns: int
    owner: int


class ShardFile(NamedTuple):
    """A shard that matched the manifest, and the state of its file at that time."""

    path: Path
    state: FileState


class DatasetLocation(Protocol):
    """Interface of a data set's location."""

    manifest: Manifest

    def ready(self, shard: int) -> ShardFile:
        """Return the checked file of a shard; raises UserError with its name if it is missing or damaged."""

    def keep(self, shards: Collection[int]) -> None:
        """Protect the shards that are in use or next from eviction."""

    def require_room(self, shards: int) -> None:
        """Raise UserError if that many shards cannot be kept at once."""


class Folder:
    """Data set in a folder. Each shard is read completely once to check it, and again if its file changed."""

    def __init__(self, directory: Path) -> None:
        """Read the manifest and the file sizes; raises UserError naming what is missing or has another size."""
        self.directory, self.manifest = directory, read_manifest(directory)
        check_files(directory, self.manifest)
        self._checked: dict[int, ShardFile] = {}

    def ready(self, shard: int) -> ShardFile:
        """Return the checked file of a shard; if it was checked before, start reading it into the page cache."""
        entry = self.manifest.shards[shard]
        path = self.directory / entry.name
        if shard in self._checked and self._checked[shard].state == state_at(path):
            read_ahead(path)
        else:
            self._checked[shard] = checked(path, entry)
        return self._checked[shard]

    def keep(self, shards: Collection[int]) -> None:
        """Do nothing: no shard is evicted."""

    def require_room(self, shards: int) -> None:
        """Do nothing."""


def checked(path: Path, entry: ShardEntry) -> ShardFile:
    """Return the file at `path`; raises UserError if it does not match the manifest."""
    try:
        with open_plain(path) as file:
            state = state_of(file)
            if state.size != entry.bytes:
                raise UserError(f"shard {path} has {state.size} bytes, the manifest says {entry.bytes}")
            found = content_sha256(file)
            if found != entry.sha256:
                raise UserError(f"shard {path} is damaged: sha256 {found}, the manifest says {entry.sha256}")
            if state_of(file) != state:
                raise changed(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return ShardFile(path, state)


def state_of(file: BinaryIO) -> FileState:
    """Return the state of an open file."""
    return _state(os.fstat(file.fileno()))


def state_at(path: Path) -> FileState | None:
    """Return the state of the file at `path`, None if it is not accessible."""
    try:
        return _state(path.stat())
    except OSError:
        return None


def changed(path: Path) -> UserError:
    """Return the error for a shard that changed while in use."""
    return UserError(f"shard {path} changed while it was in use: nobody may write to a data set during training")


def unreadable(path: Path, error: OSError) -> UserError:
    """Return the error for a shard that cannot be read."""
    return UserError(f"shard {path} cannot be read: {error.strerror}")


def read_ahead(path: Path) -> None:
    """Start reading a file into the page cache; returns at once and ignores errors."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), open_plain(path) as file:  # reading the file reports the error
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _state(status: os.stat_result) -> FileState:
    return FileState(status.st_ino, status.st_size, status.st_mtime_ns, status.st_uid)
