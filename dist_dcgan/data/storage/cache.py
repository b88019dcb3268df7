"""Cache of a remote data set's shards on a local disk, filled in the order of use."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from dist_dcgan.data.storage.location import ShardFile, checked, read_ahead, state_at
from dist_dcgan.data.storage.remote import FailedError, Remote, copy
from shards.common.errors import OneRankError, UserError
from shards.common.files import check_room, file_sha256, link_or_rename, open_folder
from shards.common.locks import Lock, NoLocksError
from shards.common.ownership import Ownership
from shards.manifest import MANIFEST_NAME, MOST_MANIFEST_BYTES, Manifest, ShardEntry, read_manifest

Result = TypeVar("Result")

_ATTEMPTS = 3
_STAGED = re.compile(r"[0-9a-f]{64}(?:\.[0-9]+)?\.tar")
_PART = re.compile(r"\.?(?:[0-9a-f]{64}\.tar|manifest\.json).*")
"""Files of a download: the file itself, its version, and what that is renamed from."""
_PARTS = "parts-"
_ORPHANED_SECONDS = 60.0
_WRITABLE_BY_OTHERS = 0o022


class Cache:
    """Remote data set whose shards are copied to `folder` while they are needed.

    Files are named by their SHA-256, so that all runs over the same data set share them; each is checked before use.
    Several processes may use one folder, and several users: a file that another user could change after the check is
    not used, but copied if it is sound.
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
            self._ownership = Ownership.on_disk_of(folder)
            _remove_orphans(folder, self._ownership)
            self._parts = _folder_of_parts(self, folder, self._ownership)
            self.manifest = self._repeat(MANIFEST_NAME, self._bring_manifest)
        except OSError as error:
            raise self._unusable(error) from None
        self.require_room(1)

    def keep(self, shards: Collection[int]) -> None:
        """Protect these shards from eviction."""
        self._kept = frozenset(self.manifest.shards[shard].sha256 for shard in shards)

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
        entry, file = self.manifest.shards[shard], self._files.get(shard)
        try:
            if file is not None and file.state == state_at(file.path):
                read_ahead(file.path)
            else:
                file = self._found(entry) or self._repeat(entry.name, lambda: self._bring(entry))
                self._files[shard] = file
            with contextlib.suppress(OSError):  # last use, for eviction
                os.utime(file.path, ns=(time.time_ns(), file.state.changed_ns), follow_symlinks=False)
        except OSError as error:
            raise self._unusable(error) from None
        return file

    def _paths(self, entry: ShardEntry) -> tuple[Path, Path]:
        """Return the path of a shard, and the one to use if another user has taken that."""
        return self._folder / f"{entry.sha256}.tar", self._folder / f"{entry.sha256}.{self._ownership.owner}.tar"

    def _found(self, entry: ShardEntry) -> ShardFile | None:
        """Return the cached file of a shard, None if there is none that can be trusted; a damaged one is removed."""
        return next(filter(None, (self._trusted(path, entry) for path in self._paths(entry))), None)

    def _trusted(self, path: Path, entry: ShardEntry) -> ShardFile | None:
        status = _status(path)
        if status is None or not self._ownership.protects(status):
            return None
        try:
            file = checked(path, entry)
        except UserError as error:
            if status.st_size != entry.bytes and _has_sha256(path, entry.sha256):
                raise UserError(f"the manifest of {self._remote} is wrong: {error}") from None
            path.unlink(missing_ok=True)
            return None
        after = _status(path)  # still that file, not one that was there only while it was checked
        same = after is not None and self._ownership.protects(after) and after.st_ino == file.state.inode
        return file if same else None

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

    def _bring(self, entry: ShardEntry) -> ShardFile:
        """Fetch a shard once; raises FailedError, also if the file is damaged."""
        part = self._parts / f"{entry.sha256}.tar"
        self._make_room(entry)
        check_room(self._folder, entry.bytes, f"{entry.name} takes", ": use a smaller --data.cache-gb")
        try:
            file = self._copied(entry, part)
            if file is None:
                self._remote.fetch(entry.name, part, entry.bytes)
                file = _sound(part, entry)
            return self._publish(part, file, entry)
        finally:
            _remove(part)

    def _copied(self, entry: ShardEntry, part: Path) -> ShardFile | None:
        """Return a copy of a file that others can change, None if there is none that is sound."""
        for path in self._paths(entry):
            with contextlib.suppress(FailedError, UserError):
                if _status(path) is not None:
                    copy(path, part, entry.bytes)
                    return _sound(part, entry)
            _remove(part)
        return None

    def _publish(self, part: Path, file: ShardFile, entry: ShardEntry) -> ShardFile:
        """Link a checked part to its name; if another process was faster, keep that file, which may be open."""
        for path in self._paths(entry):
            status = _status(path)
            if status is not None and self._ownership.belongs(status) and not self._ownership.protects(status):
                path.unlink(missing_ok=True)  # of this user, and writable by others: replaced by the copy
            try:
                link_or_rename(part, path)
                return ShardFile(path, file.state)
            except FileExistsError:
                found = self._trusted(path, entry)
            if found is not None:
                return found
        raise UserError(f"{path} is another user's: give --data.cache-dir a folder of your own")

    def _make_room(self, entry: ShardEntry) -> None:
        """Evict unprotected shards, least recently used first, until this one fits instead of its own old file."""
        own = staged(self._folder, self._ownership.owner)
        files = sorted(
            (status.st_atime_ns, status.st_size, path) for path, status in own if path.name[:64] != entry.sha256
        )
        taken = sum(size for _, size, _ in files)
        for _, size, path in files:
            if taken + entry.bytes <= self._budget_bytes:
                return
            if path.name[:64] not in self._kept:
                with contextlib.suppress(OSError):  # busy: the next makes room instead
                    path.unlink(missing_ok=True)
                    taken -= size

    def _bring_manifest(self) -> Manifest:
        path = self._parts / MANIFEST_NAME
        try:
            self._remote.fetch(MANIFEST_NAME, path, MOST_MANIFEST_BYTES)
            return _read_manifest(self._parts, str(self._remote))
        finally:
            _remove(path)

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"the cache {self._folder} cannot be used: {error.strerror or error}")


def staged(folder: Path, owner: int) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the shards in the cache `folder` that belong to the user `owner`: no others are counted or evicted."""
    for path in folder.glob("*.tar"):
        status = _status(path) if _STAGED.fullmatch(path.name) else None
        if status is not None and stat.S_ISREG(status.st_mode) and status.st_uid == owner:
            yield path, status


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a file or link, None if there is none."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _has_sha256(path: Path, sha256: str) -> bool:
    try:
        return file_sha256(path) == sha256
    except OSError:  # another process evicts, too
        return False


def _read_manifest(parts: Path, location: str) -> Manifest:
    try:
        return read_manifest(parts)
    except UserError as error:
        raise FailedError(str(error).replace(str(parts), location)) from None


def _sound(part: Path, entry: ShardEntry) -> ShardFile:
    """Return the part, which others cannot write to; raises FailedError if it is damaged."""
    with contextlib.suppress(OSError):  # file systems without permissions
        part.chmod(stat.S_IMODE(part.lstat().st_mode) & ~_WRITABLE_BY_OTHERS)
    try:
        return checked(part, entry)
    except UserError as error:
        raise FailedError(str(error).replace(f"{part}", entry.name)) from None


def _remove(part: Path) -> None:
    for path in (part, part.with_name(part.name + ".json")):
        with contextlib.suppress(OSError):  # busy: removed with its folder
            path.unlink(missing_ok=True)


def _folder_of_parts(owner: object, folder: Path, ownership: Ownership) -> Path:
    """Make a folder for partial files, locked while this process runs and removed with `owner`.

    The path returned leads to this folder even if the owner of `folder` renames it and puts another one there.
    """
    parts = Path(tempfile.mkdtemp(prefix=_PARTS, dir=folder))
    lock = Lock(parts)
    descriptor = open_folder(parts)
    weakref.finalize(owner, _remove_parts, parts, descriptor, lock)
    status = os.fstat(descriptor)
    if status.st_uid != ownership.owner or status.st_mode & ownership.forbidden:
        raise UserError(f"{parts} was exchanged by another user: give --data.cache-dir a folder of your own")
    with contextlib.suppress(NoLocksError):  # orphans are not removed there
        lock.take()
    return Path(f"/proc/self/fd/{descriptor}") if Path("/proc/self/fd").is_dir() else parts


def _remove_orphans(folder: Path, ownership: Ownership) -> None:
    """Remove folders of partial files whose process has ended."""
    for parts in folder.glob(f"{_PARTS}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or just removed by another
            status = parts.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != ownership.owner:
                continue
            if time.time() - status.st_mtime > _ORPHANED_SECONDS:  # one that was just made is about to be locked
                with Lock(parts) as lock:
                    if lock.take():
                        _empty(parts, open_folder(parts))


def _empty(parts: Path, descriptor: int) -> None:
    """Remove the partial files in an open folder, then the folder unless it has others: its name may be misleading."""
    try:
        for name in os.listdir(descriptor):
            if _PART.fullmatch(name):
                os.unlink(name, dir_fd=descriptor)
        parts.rmdir()
    finally:
        os.close(descriptor)


def _remove_parts(parts: Path, descriptor: int, lock: Lock) -> None:
    with contextlib.suppress(OSError):  # busy: another run removes it later
        _empty(parts, descriptor)
    lock.close()
