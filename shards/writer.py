"""Write shards and JSON lists atomically; the same samples give the same bytes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

from shards.common.files import atomic_file, file_sha256, sync_directory
from shards.manifest import TAR_BLOCK, TAR_END, Layout, ShardEntry

KEYS_NAME = "keys.jsonl"
"""The original key of every sample that has another name in its shard."""

REJECTED_NAME = "rejected.jsonl"
"""The key of every rejected source entry, with the reason."""


_NAME_BYTES = 100
_CHECKSUM = slice(148, 156)


def tar_header(key: str, size: int) -> bytes:
    """Return the USTAR header, one block, of the member `key`.ppm of `size` bytes; time and owner are 0."""
    nameless, total = _nameless_header(size)
    name = key.encode("ascii") + b".ppm"
    assert len(name) <= _NAME_BYTES, key
    checksum = b"%06o\0 " % (total + sum(name))
    rest = nameless[_NAME_BYTES : _CHECKSUM.start], nameless[_CHECKSUM.stop :]
    return name.ljust(_NAME_BYTES, b"\0") + rest[0] + checksum + rest[1]


@functools.cache
def _nameless_header(size: int) -> tuple[bytes, int]:
    """Return the header of a member without a name, and its byte sum with spaces as the checksum."""
    member = tarfile.TarInfo()  # mode 0644; time, user and group 0; no user and group name
    member.size = size
    header = member.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == TAR_BLOCK
    return header, sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ")


def write_shard(path: Path, layout: Layout, samples: Iterator[tuple[str, bytes]]) -> ShardEntry | None:
    """Write (member key, PPM file) `samples` atomically to the shard `path` and return its manifest entry.

    Returns None and writes nothing if there are no samples; leaves no file if an error is raised. Keys must
    be unique.
    """
    first = next(samples, None)
    if first is None:
        return None
    sha256, keys = hashlib.sha256(), set[str]()
    padding = bytes(layout.stride - TAR_BLOCK - layout.member_bytes)
    with atomic_file(path) as file:
        for key, ppm in chain([first], samples):
            assert key not in keys and len(ppm) == layout.member_bytes, (key, len(ppm))
            keys.add(key)
            block = tar_header(key, len(ppm)) + ppm + padding
            sha256.update(block)
            file.write(block)
        sha256.update(bytes(TAR_END))
        file.write(bytes(TAR_END))
    size = layout.shard_bytes(len(keys))
    return ShardEntry(name=path.name, samples=len(keys), bytes=size, sha256=sha256.hexdigest())


def describe_key(key: bytes) -> dict[str, str]:
    """Return the JSON form of a source key: `key` if it is UTF-8, else `key_hex`."""
    try:
        return {"key": key.decode()}
    except UnicodeDecodeError:
        return {"key_hex": key.hex()}


class JsonLines:
    """Writer of a JSON Lines file, which is created by `publish` and only if it has at least one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file: IO[str] | None = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the temporary file if it was not published."""
        if self._file is not None:
            try:
                self._file.close()
            finally:  # close flushes, which fails on a full disk
                self._temporary.unlink()

    def extend(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append objects."""
        if self._file is None and lines:
            self._file = self._temporary.open("w", encoding="ascii")
        for line in lines:
            assert self._file is not None
            self._file.write(json.dumps(line) + "\n")

    def publish(self) -> str | None:
        """Create the file atomically and durably and return its SHA-256, or None if it has no lines."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._temporary.replace(self.path)
        sync_directory(self.path.parent)
        return file_sha256(self.path)
