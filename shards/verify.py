"""Check every byte of a data set against its manifest and the format."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from shards.common.files import file_sha256, open_plain
from shards.common.progress import Progress
from shards.common.workers import Tick, available_cores, map_in_order
from shards.manifest import TAR_BLOCK, TAR_END, Layout, Manifest, ShardEntry, read_manifest
from shards.reader import NAME_FIELD, member_of
from shards.writer import KEYS_NAME, REJECTED_NAME, tar_header

_PROBLEMS_PER_SHARD = 20
"""Lines reported per shard; more add no information."""

_CHECKSUM_FIELD = slice(148, 156)

_CONSTANT_FIELDS = {
    "mode": slice(100, 108),
    "uid": slice(108, 116),
    "gid": slice(116, 124),
    "size": slice(124, 136),
    "mtime": slice(136, 148),
    "type": slice(156, 157),
    "link name": slice(157, 257),
    "magic": slice(257, 265),
    "user name": slice(265, 297),
    "group name": slice(297, 329),
    "device": slice(329, 345),
    "prefix": slice(345, 500),
    "reserved": slice(500, 512),
}
"""USTAR header fields that are equal for all members of a data set."""


def verify(directory: Path, workers: int = 0) -> tuple[Manifest, list[str]]:
    """Check the data set in `directory`; return its manifest and one line per problem, none if it is intact.

    Checks the manifest's digest; the set of shards; each shard's size, SHA-256, tar headers, PPM headers,
    padding and end; and the lists of renamed and rejected keys. Reports at most 20 problems per shard.
    `workers` 0 means all available cores. Raises UserError if the manifest is missing or damaged.
    """
    manifest = read_manifest(directory)
    workers = min(workers or available_cores(), len(manifest.shards))
    check = partial(check_shard, directory, manifest)
    with (
        Progress(manifest.samples, "verify") as progress,
        closing(map_in_order(check, manifest.shards, workers, progress.advance)) as results,
    ):
        problems = [problem for result in results for problem in result]
    return manifest, [*problems, *_strays(directory, manifest), *_list_problems(directory, manifest)]


def _strays(directory: Path, manifest: Manifest) -> list[str]:
    """Return a line per shard file that is not in the manifest; readers that glob shard-*.tar would read it."""
    listed = {shard.name for shard in manifest.shards}
    return [
        f"{path.name}: not in the manifest" for path in sorted(directory.glob("shard-*.tar")) if path.name not in listed
    ]


def _list_problems(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the problems of the lists of renamed and rejected keys."""
    for name in (KEYS_NAME, REJECTED_NAME):
        path, expected = directory / name, manifest.lists.get(name)
        try:
            found = file_sha256(path) if os.path.lexists(path) else None
        except OSError as error:
            yield f"{name}: cannot be read: {error.strerror}"
            continue
        if found is None and expected is not None:
            yield f"{name}: is missing"
        elif expected is None and found is not None:
            yield f"{name}: not in the manifest"
        elif found != expected:
            yield f"{name}: its SHA-256 is {found}, not the manifest's: the content changed"


def check_shard(directory: Path, manifest: Manifest, shard: ShardEntry, tick: Tick) -> list[str]:
    """Return the problems of `shard`, one line each: the first 20, then the number of further ones."""
    try:
        problems = list(_problems(directory / shard.name, manifest, shard, tick))
    except OSError as error:
        problems = [f"cannot be read: {error.strerror}"]
    more = len(problems) - _PROBLEMS_PER_SHARD
    if more > 0:
        problems[_PROBLEMS_PER_SHARD:] = [f"and {more} problems more"]
    return [f"{shard.name}: {problem}" for problem in problems]


def _problems(path: Path, manifest: Manifest, shard: ShardEntry, tick: Tick) -> Iterator[str]:
    if not path.is_file():
        yield "is missing"
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"has {size} bytes, the manifest says {shard.bytes}: {_where_it_ends(size, shard, manifest.layout)}"
        return
    layout, sha256, keys, problems = manifest.layout, hashlib.sha256(), set[str](), list[str]()
    alike = tar_header("key", layout.member_bytes)
    with open_plain(path) as raw, io.BufferedReader(raw) as file:  # type: ignore[type-var]  # a FileIO
        for index in range(shard.samples):
            block = file.read(layout.stride)
            sha256.update(block)
            where = f"sample {index} at byte {index * layout.stride}"
            problems += [f"{where}: {problem}" for problem in _sample_problems(block, layout, alike, keys)]
            tick(1)
        end = file.read()
    sha256.update(end)
    if sha256.hexdigest() != shard.sha256:
        yield _explain_sha256(manifest, sha256.hexdigest())
    yield from problems
    if any(end):
        yield f"the {TAR_END} bytes at its end are not all zero"


def _explain_sha256(manifest: Manifest, found: str) -> str:
    alike = (f"its content is that of {other.name}" for other in manifest.shards if other.sha256 == found)
    return next(alike, f"its SHA-256 is {found}, not the manifest's: the content changed")


def _where_it_ends(size: int, shard: ShardEntry, layout: Layout) -> str:
    if size > shard.bytes:
        return f"{size - shard.bytes} bytes follow its end"
    if size >= shard.samples * layout.stride:
        return "cut off in the zeros at its end"
    return f"cut off in sample {size // layout.stride} of {shard.samples}"


def _sample_problems(block: bytes, layout: Layout, alike: bytes, keys: set[str]) -> Iterator[str]:
    """Yield the problems of one sample's tar header, PPM header and padding; add its key to `keys`.

    `alike` is a correct header of the data set, equal except for name and checksum.
    """
    header = block[:TAR_BLOCK]
    key = member_of(header)
    if key is None:
        yield f"its name {header[NAME_FIELD].rstrip(bytes(1))!r} is none that the format allows"
    elif key in keys:
        yield f"its key {key} came before"
    else:
        keys.add(key)
    for field, place in _CONSTANT_FIELDS.items():
        if header[place] != alike[place]:
            yield f"header field {field} is {header[place]!r}, not {alike[place]!r}"
    if header[_CHECKSUM_FIELD] != _checksum(header):
        yield f"header checksum is {header[_CHECKSUM_FIELD]!r}, not {_checksum(header)!r}"
    if block[TAR_BLOCK : layout.pixel_offset] != layout.ppm_header:
        yield f"its PPM header is {block[TAR_BLOCK : layout.pixel_offset]!r}, not {layout.ppm_header!r}"
    if any(block[TAR_BLOCK + layout.member_bytes :]):
        yield "its padding is not all zero"


def _checksum(header: bytes) -> bytes:
    """Return the checksum field of a tar header: the sum of its bytes, with that field as eight spaces."""
    rest = sum(header[: _CHECKSUM_FIELD.start]) + sum(header[_CHECKSUM_FIELD.stop :])
    return b"%06o\0 " % (rest + 8 * ord(" "))
