"""Write shards and JSON lists atomically; the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from shards.common.files import atomic_file, file_sha256
from shards.manifest import TAR_BLOCK, TAR_END, Layout, ShardEntry

KEYS_NAME = "keys.jsonl"
"""The original key of every sample that has another name in its shard."""

REJECTED_NAME = "rejected.jsonl"
"""The key of every rejected source entry, with the reason."""


def tar_header(key: str, size: int) -> bytes:
    """Return the USTAR header, one block, of the member `key`.ppm of `size` bytes; time and owner are 0."""
    member = tarfile.TarInfo(f"{key}.ppm")  # mode 0644; time, user and group 0; no user and group name
    member.size = size
    header = member.tobuf(tarfile.USTAR_FORMAT)
    assert len(header) == TAR_BLOCK, key
    return header


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


def write_json_lines(path: Path, lines: Iterator[Mapping[str, Any]]) -> str | None:
    """Write a JSON Lines file atomically and durably and return its SHA-256.

    Returns None if there are no lines; an existing file is then removed.
    """
    first = next(lines, None)
    if first is None:
        path.unlink(missing_ok=True)
        return None
    with atomic_file(path) as file:
        for line in chain([first], lines):
            file.write(json.dumps(line).encode() + b"\n")
    return file_sha256(path)
