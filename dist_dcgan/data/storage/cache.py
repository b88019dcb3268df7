"""Cache of a remote data set's shards on a local disk, filled in the order of use."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from dist_dcgan.data.storage.location import ShardFile, checked, read_ahead, state_at
from dist_dcgan.data.storage.remote import FailedError, Remote
from shards.common.errors import OneRankError, UserError
from shards.common.files import link_or_rename
from shards.common.locks import Lock, NoLocksError
from shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest

Result = TypeVar("Result")

_ATTEMPTS = 3
_STAGED = re.compile(r"[0-9a-f]{64}\.tar")
_PARTS = "parts-"
_ORPHANED_SECONDS = 60.0
_MOST_MANIFEST_BYTES = 1 << 28


class Cache:
    """Remote data set whose shards are copied to `folder` while they are needed.

    Files are named by their SHA-256, so that all runs over the same data set share them; each is checked before use.
    Several processes may use one folder.
    """

    def __init__(self, remote: Remote, folder: Path, budget_bytes: int) -> None:
        """Fetch the manifest; shards are fetched on request, and others evicted to stay within `budget_bytes`."""
        self._remote, self._folder, self._budget_bytes = remote, folder, budget_bytes
        self._files: dict[int, ShardFile] = {}
        self._kept: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / MANIFEST_NAME).exists():
                raise UserError(f"{folder} holds a data set: give --data.cache-dir a folder of its own")
            _remove_orphans(folder)
            self._parts = _folder_of_parts(self, folder)
            self.manifest = self._repeat(MANIFEST_NAME, self._bring_manifest)
        except OSError as error:
            raise self._unusable(error) from None

    def keep(self, shards: Collection[int]) -> None:
        """Protect these shards from eviction."""
        self._kept = frozenset(_name(self.manifest.shards[shard]) for shard in shards)

    def require_room(self, shards: int) -> None:
        """Raise UserError if that many shards exceed the budget."""
        needed = sum(sorted((entry.bytes for entry in self.manifest.shards), reverse=True)[:shards])
        if needed > self._budget_bytes:
            raise UserError(
                f"data.cache_gb {self._budget_bytes / 1e9:g} is too small: the shards that are in use at a time take "
                f"{needed / 1e9:.3g} GB; use more, or a smaller data.window_shards"
            )

    def ready(self, shard: int) -> ShardFile:
        """Return the file of a shard; fetch it if it is not in the cache."""
        with self._lock:
            return self._ready(shard)

    def _ready(self, shard: int) -> ShardFile:
        entry = self.manifest.shards[shard]
        path = self._folder / _name(entry)
        try:
            if shard in self._files and self._files[shard].state == state_at(path):
                read_ahead(path)
            else:
                self._files[shard] = self._found(path, entry) or self._repeat(
                    entry.name, lambda: self._bring(path, entry)
                )
            with contextlib.suppress(OSError):  # last use, for eviction; may be another user's file
                os.utime(path, ns=(time.time_ns(), self._files[shard].state.changed_ns))
        except OSError as error:
            raise self._unusable(error) from None
        return self._files[shard]

    def _found(self, path: Path, entry: ShardEntry) -> ShardFile | None:
        """Return the cached file, None if there is none; a damaged one is removed."""
        try:
            return checked(path, entry) if path.exists() else None
        except UserError:
            path.unlink(missing_ok=True)
            return None

    def _repeat(self, name: str, bring: Callable[[], Result]) -> Result:
        """Fetch a file, again if the transfer fails or the file is damaged."""
        reason = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(2**attempt - 1)
            try:
                return bring()
            except FailedError as error:
                reason = str(error)
        raise OneRankError(f"{name} cannot be had from {self._remote}: {reason}")

    def _bring(self, path: Path, entry: ShardEntry) -> ShardFile:
        """Fetch a shard once; raises FailedError, also if the file is damaged."""
        part = self._parts / path.name
        self._make_room(entry.bytes)
        try:
            self._remote.fetch(entry.name, part, entry.bytes)
            return _publish(part, path, _sound(part, entry), entry)
        finally:
            _remove(part)

    def _make_room(self, required_bytes: int) -> None:
        """Evict unprotected shards, least recently used first, until `required_bytes` more fit."""
        files = list[tuple[int, int, Path]]()
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process evicts, too
                if _STAGED.fullmatch(path.name):
                    status = path.stat()
                    files.append((status.st_atime_ns, status.st_size, path))
        taken = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if taken + required_bytes <= self._budget_bytes:
                return
            if path.name not in self._kept:
                with contextlib.suppress(OSError):  # another user's, or busy: the next makes room instead
                    path.unlink(missing_ok=True)
                    taken -= size

    def _bring_manifest(self) -> Manifest:
        path = self._parts / MANIFEST_NAME
        try:
            self._remote.fetch(MANIFEST_NAME, path, _MOST_MANIFEST_BYTES)
            return _read_manifest(self._parts, str(self._remote))
        finally:
            _remove(path)

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"the cache {self._folder} cannot be used: {error.strerror or error}")


def _name(entry: ShardEntry) -> str:
    return f"{entry.sha256}.tar"


def _read_manifest(parts: Path, location: str) -> Manifest:
    try:
        return read_manifest(parts)
    except UserError as error:
        raise FailedError(str(error).replace(str(parts), location)) from None


def _sound(part: Path, entry: ShardEntry) -> ShardFile:
    try:
        return checked(part, entry)
    except UserError as error:
        raise FailedError(str(error)) from None


def _publish(part: Path, path: Path, file: ShardFile, entry: ShardEntry) -> ShardFile:
    """Link a checked part to its name; if another process was faster, keep that file, which may be open."""
    try:
        link_or_rename(part, path)
    except FileExistsError:
        return checked(path, entry)
    return ShardFile(path, file.state)


def _remove(part: Path) -> None:
    for path in (part, part.with_name(part.name + ".json")):
        with contextlib.suppress(OSError):  # busy: removed with its folder
            path.unlink(missing_ok=True)


def _folder_of_parts(owner: object, folder: Path) -> Path:
    """Make a folder for partial files, locked while this process runs and removed with `owner`."""
    parts = Path(tempfile.mkdtemp(prefix=_PARTS, dir=folder))
    lock = Lock(parts)
    with contextlib.suppress(NoLocksError):  # orphans are not removed there
        lock.take()
    weakref.finalize(owner, _remove_parts, parts, lock)
    return parts


def _remove_orphans(folder: Path) -> None:
    """Remove folders of partial files whose process has ended."""
    for parts in folder.glob(f"{_PARTS}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or just removed by another
            if time.time() - parts.stat().st_mtime > _ORPHANED_SECONDS:  # one that was just made is about to be locked
                with Lock(parts) as lock:
                    if lock.take():
                        shutil.rmtree(parts)


def _remove_parts(parts: Path, lock: Lock) -> None:
    shutil.rmtree(parts, ignore_errors=True)
    lock.close()
