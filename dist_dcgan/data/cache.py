"""Shards staged on a disk of this machine, from wherever they lie, in the order in which they are needed."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path

from dist_dcgan.data.places import ShardFile, checked, read_ahead, state_at
from dist_dcgan.data.remote import FailedError, Remote
from shards.errors import UserError
from shards.manifest import MANIFEST_NAME, Manifest, ShardEntry, read_manifest

_ATTEMPTS = 3
_PART = re.compile(r"[0-9a-f]{64}\.tar\.(\d+)\.part(\.json)?")


class Cache:
    """A data set that lies elsewhere; its shards are files in `folder` while they are needed.

    Files are named by their SHA-256, so that runs over the same data set, wherever it lies, find what others staged;
    it is checked before it is used. Several processes may use one folder.
    """

    def __init__(self, remote: Remote, folder: Path, budget_bytes: int) -> None:
        """Bring the manifest; shards follow as they are asked for, and make room beyond `budget_bytes`."""
        self._remote, self._folder, self._budget_bytes = remote, folder, budget_bytes
        self._files: dict[int, ShardFile] = {}
        self._kept: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_orphans(folder)
            self.manifest = self._bring_manifest()
        except OSError as error:
            raise self._unusable(error) from None

    def keep(self, shards: Collection[int]) -> None:
        """Keep these shards where others must make room; raises UserError where they do not fit in."""
        entries = [self.manifest.shards[shard] for shard in shards]
        needed = sum(entry.bytes for entry in entries)
        if needed > self._budget_bytes:
            raise UserError(
                f"data.cache_gb {self._budget_bytes / 1e9:g} is too small: the shards that are in use at a time take "
                f"{needed / 1e9:.3g} GB; use more, or a smaller data.window_shards"
            )
        self._kept = frozenset(map(_name, entries))

    def ready(self, shard: int) -> ShardFile:
        """Return the file of a shard: the one that is here, or after bringing it."""
        with self._lock:
            return self._ready(shard)

    def _ready(self, shard: int) -> ShardFile:
        entry = self.manifest.shards[shard]
        path = self._folder / _name(entry)
        try:
            if shard in self._files and self._files[shard].state == state_at(path):
                read_ahead(path)
            else:
                self._files[shard] = self._found(path, entry) or self._bring(path, entry)
            with contextlib.suppress(FileNotFoundError):  # its last use, which disks may be told not to note
                os.utime(path, ns=(time.time_ns(), self._files[shard].state.changed_ns))
        except OSError as error:
            raise self._unusable(error) from None
        return self._files[shard]

    def _found(self, path: Path, entry: ShardEntry) -> ShardFile | None:
        """Return the file that another run left; a damaged one is removed."""
        try:
            return checked(path, entry) if path.exists() else None
        except UserError:
            path.unlink(missing_ok=True)
            return None

    def _bring(self, path: Path, entry: ShardEntry) -> ShardFile:
        """Bring a shard, again where it does not come or comes damaged."""
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        reason = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(2**attempt - 1)
            self._make_room(entry.bytes)
            try:
                return _publish(part, path, self._fetched(entry, part), entry)
            except FailedError as error:
                reason = str(error)
            finally:
                _remove(part)
        raise UserError(f"{entry.name} cannot be had from {self._remote}: {reason}")

    def _fetched(self, entry: ShardEntry, part: Path) -> ShardFile:
        """Bring a shard once; raises FailedError where it comes damaged, too."""
        self._remote.fetch(entry.name, part)
        try:
            return checked(part, entry)
        except UserError as error:
            raise FailedError(str(error)) from None

    def _make_room(self, required_bytes: int) -> None:
        """Remove what need not be kept, the longest unused first, until `required_bytes` more fit in."""
        files = list[tuple[int, int, Path]]()
        for path in self._folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                status = path.stat()
                files.append((status.st_atime_ns, status.st_size, path))
        taken = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if taken + required_bytes <= self._budget_bytes:
                return
            if path.name not in self._kept:
                path.unlink(missing_ok=True)
                taken -= size

    def _bring_manifest(self) -> Manifest:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            try:
                self._remote.fetch(MANIFEST_NAME, Path(folder) / MANIFEST_NAME)
                return read_manifest(Path(folder))
            except FailedError as error:
                raise UserError(f"{MANIFEST_NAME} cannot be had from {self._remote}: {error}") from None
            except UserError as error:
                raise UserError(str(error).replace(folder, str(self._remote))) from None

    def _unusable(self, error: OSError) -> UserError:
        return UserError(f"the cache {self._folder} cannot be used: {error.strerror or error}")


def _name(entry: ShardEntry) -> str:
    return f"{entry.sha256}.tar"


def _publish(part: Path, path: Path, file: ShardFile, entry: ShardEntry) -> ShardFile:
    """Give a checked part its name, unless another process was faster: whoever has opened that one keeps it."""
    try:
        os.link(part, path)
    except FileExistsError:
        return checked(path, entry)
    except OSError:  # a file system without links
        part.replace(path)
    return ShardFile(path, file.state)


def _remove(part: Path) -> None:
    for path in (part, part.with_name(part.name + ".json")):
        path.unlink(missing_ok=True)


def _remove_orphans(folder: Path) -> None:
    """Remove what processes of this machine left that are no more."""
    for path in folder.iterdir():
        match = _PART.fullmatch(path.name)
        if match and not Path("/proc", match[1]).exists() and Path("/proc/self").exists():
            path.unlink(missing_ok=True)
