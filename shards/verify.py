"""Every byte of a data set against its manifest and the format: what is wrong, and where."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from shards.manifest import TAR_BLOCK, TAR_END, Layout, Manifest, ShardEntry, member_key, read_manifest
from shards.progress import Progress
from shards.reader import NAME_FIELD, member_of
from shards.workers import Tick, available_cores, map_in_order
from shards.writer import KEYS_NAME, REJECTED_NAME, describe_key, tar_header

_PROBLEMS_PER_FILE = 20
"""More lines about one file tell nothing new."""

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
"""The fields of a USTAR header that every member of a data set has alike."""


def verify(directory: Path, workers: int = 0) -> tuple[Manifest, list[str]]:
    """Check the data set in `directory`; return its manifest and one line per problem, none where intact.

    Checks the manifest's digest, the set of shards, and of every shard its size, SHA-256, every header, PPM
    header and padding, and the end. Of the listings of renamed and rejected keys, which the manifest does not
    hash, it checks what can be told: that every renamed key has that SHA-1, and how many are rejected.
    `workers` 0 means all available cores. Raises UserError where there is no data set or its manifest is damaged.
    """
    manifest = read_manifest(directory)
    workers = min(workers or available_cores(), len(manifest.shards))
    with (
        Progress(manifest.samples, "verify") as progress,
        closing(map_in_order(ShardCheck(directory, manifest), manifest.shards, workers, progress)) as results,
    ):
        problems = [problem for result in results for problem in result]
    return manifest, [*problems, *_strays(directory, manifest), *_listing_problems(directory, manifest)]


def _strays(directory: Path, manifest: Manifest) -> list[str]:
    """Shards that are not of this data set, which a reader that globs shard-*.tar would mix in."""
    listed = {shard.name for shard in manifest.shards}
    return [
        f"{path.name}: not in the manifest" for path in sorted(directory.glob("shard-*.tar")) if path.name not in listed
    ]


def _lines_about(name: str, problems: Iterator[str]) -> Iterator[str]:
    """Yield the first few of a file's problems, and how many more, each with the file's name."""
    yield from (f"{name}: {problem}" for problem in islice(problems, _PROBLEMS_PER_FILE))
    more = sum(1 for _ in problems)
    if more:
        yield f"{name}: and {more} problems more"


def _listing_problems(directory: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the listings of renamed and of rejected keys."""
    keys, rejected = directory / KEYS_NAME, directory / REJECTED_NAME
    yield from _lines_about(KEYS_NAME, _readable(_wrong_lines(keys, _is_renaming)))
    wrong = chain(_wrong_lines(rejected, _is_rejection), _wrong_count(rejected, manifest.rejected))
    yield from _lines_about(REJECTED_NAME, _readable(wrong))


def _readable(problems: Iterator[str]) -> Iterator[str]:
    try:
        yield from problems
    except OSError as error:
        yield f"cannot be read: {error.strerror}"


def _wrong_lines(path: Path, is_right: Callable[[Any], bool]) -> Iterator[str]:
    """Yield the lines of a listing, which may be absent, that are not as the format asks."""
    if not path.exists():
        return
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not _is_right_line(line, is_right):
                yield f"line {number} is none that the format allows: {line[:60]!r}"
    if number == 0:
        yield "is empty, it is there only where it has lines"


def _wrong_count(path: Path, rejected: int) -> Iterator[str]:
    if not path.exists():
        if rejected:
            yield f"is missing, the manifest counts {rejected} rejected entries"
        return
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    if lines != rejected:
        yield f"has {lines} lines, the manifest counts {rejected} rejected entries"


def _is_right_line(line: bytes, is_right: Callable[[Any], bool]) -> bool:
    try:
        return line.endswith(b"\n") and is_right(json.loads(line))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False  # not JSON, or not of the fields and types that were asked for


def _is_renaming(entry: Any) -> bool:
    """Return whether `entry` of keys.jsonl pairs a key with the name that replaces it: the name is its SHA-1."""
    key = _key_of(entry)
    member = member_key(key)
    return member.encode() != key and bool(entry == {"member": member} | describe_key(key))


def _is_rejection(entry: Any) -> bool:
    """Return whether `entry` of rejected.jsonl gives a key and a reason."""
    return isinstance(entry["reason"], str) and entry == describe_key(_key_of(entry)) | {"reason": entry["reason"]}


def _key_of(entry: Any) -> bytes:
    return bytes.fromhex(entry["key_hex"]) if "key_hex" in entry else entry["key"].encode()


@dataclass(frozen=True)
class ShardCheck:
    """The task that checks one shard of a data set."""

    directory: Path
    manifest: Manifest

    def __call__(self, shard: ShardEntry, tick: Tick) -> list[str]:
        """Return what is wrong with `shard`, one line each: the first few, and how many more."""
        return list(_lines_about(shard.name, _readable(self._problems(shard, tick))))

    def _problems(self, shard: ShardEntry, tick: Tick) -> Iterator[str]:
        path, layout = self.directory / shard.name, self.manifest.layout
        if not path.is_file():
            yield "is missing"
            return
        size = path.stat().st_size
        if size != shard.bytes:
            yield f"has {size} bytes, the manifest says {shard.bytes}: {_where_it_ends(size, shard, layout)}"
            return
        yield from self._content_problems(path, shard, tick)

    def _content_problems(self, path: Path, shard: ShardEntry, tick: Tick) -> Iterator[str]:
        layout = self.manifest.layout
        sha256, keys, problems = hashlib.sha256(), set[str](), list[str]()
        alike = tar_header("key", layout.member_bytes)
        with path.open("rb") as file:
            for index in range(shard.samples):
                block = file.read(layout.stride)
                sha256.update(block)
                where = f"sample {index} at byte {index * layout.stride}"
                problems += [f"{where}: {problem}" for problem in _sample_problems(block, layout, alike, keys)]
                tick(1)
            end = file.read()
        sha256.update(end)
        if sha256.hexdigest() != shard.sha256:
            yield self._explain_sha256(sha256.hexdigest())
        yield from problems
        if any(end):
            yield f"the {TAR_END} bytes at its end are not all zero"

    def _explain_sha256(self, found: str) -> str:
        for other in self.manifest.shards:
            if other.sha256 == found:
                return f"its content is that of {other.name}"
        return f"its SHA-256 is {found}, not the manifest's: the content changed"


def _where_it_ends(size: int, shard: ShardEntry, layout: Layout) -> str:
    if size > shard.bytes:
        return f"{size - shard.bytes} bytes follow its end"
    if size >= shard.samples * layout.stride:
        return "cut off in the zeros at its end"
    return f"cut off in sample {size // layout.stride} of {shard.samples}"


def _sample_problems(block: bytes, layout: Layout, alike: bytes, keys: set[str]) -> Iterator[str]:
    """Yield what is wrong with one sample's header, PPM header and padding; add its key to `keys`.

    `alike` is a right header of the data set, the same in all but name and checksum.
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
    """Return the checksum field of a tar header: the sum of its bytes, with eight spaces for that field."""
    rest = sum(header[: _CHECKSUM_FIELD.start]) + sum(header[_CHECKSUM_FIELD.stop :])
    return b"%06o\0 " % (rest + 8 * ord(" "))
