"""List the members of an untrusted tar from its headers, in constant memory; every number is checked.

Python's tarfile does not do for other people's files: it stops silently at a damaged header, and crafted headers make
it hang (CVE-2025-8194, CVE-2024-6232), recurse without limit or exhaust memory. Here a tar is read to its end or raises
an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from shards.manifest import TAR_BLOCK, TAR_END

_MAX_EXTENSION = 1 << 20
"""Largest extension header (a long name or PAX records), in bytes."""

_MAX_END = TAR_END + 10240
"""Most zero bytes at the end: two blocks, then padding to a record. More are a sign of an incomplete copy."""

_RECORD_SIZES = tuple(TAR_BLOCK << power for power in range(5, 12))
"""Sizes of larger records that are believed: 32 to 2,048 blocks (`tar -b`), powers of two.

Any length is a whole number of records of some size, so that other sizes would say nothing about a copy.
"""
_TAIL = 16
"""No image ends in as many zeros, but the rest of a copy that was cut in a member does."""

_CHUNK = 1 << 16

_PACKED = {
    b"\x1f\x8b": "gunzip",
    b"\x1f\x9d": "uncompress",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\0": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
    b"LZIP": "lzip -d",
    b"PK\3\4": "unzip",
    b"7z\xbc\xaf": "7z x",
    b"Rar!": "unrar x",
}

_NAME, _SIZE, _CHECKSUM, _KIND = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
_MAGIC, _PREFIX = slice(257, 263), slice(345, 500)
_SPARSE_MAP_GOES_ON, _SPARSE_BLOCK_GOES_ON = 482, 504

_FILES, _FOLDER, _OLD_FILE, _WITHOUT_CONTENT = b"07\0", b"5", b"\0", b"123456"
_LINKS = {
    b"1": "a hard link in its tar, without content: pack with tar --hard-dereference",
    b"2": "a symbolic link in its tar, without content: pack with tar --dereference",
}
_LONG_NAME, _LONG_LINK, _SPARSE, _RECORDS, _RECORDS_FOR_ALL = b"L", b"K", b"S", b"xX", b"g"
_EXTENSIONS = _LONG_NAME + _LONG_LINK + _RECORDS + _RECORDS_FOR_ALL

_NUMBER = re.compile(rb"[0-9]{1,20}")
_OCTAL_NUMBER = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)


class DamagedError(Exception):
    """The file is not a valid tar. The message follows the file's name."""


class Member(NamedTuple):
    """One member of a tar."""

    name: bytes
    offset: int
    """Offset of its content in the tar."""
    size: int
    """Size of its content in the tar, in bytes."""
    is_folder: bool
    problem: str
    """What it is instead of a regular file, with the remedy; empty for a regular file."""

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file and not sparse."""
        return not (self.problem or self.is_folder)


class _Header(NamedTuple):
    """One header block."""

    place: int
    block: bytes
    name: bytes
    kind: bytes
    size: int

    @property
    def end(self) -> int:
        return self.place + TAR_BLOCK


def members(descriptor: int) -> Iterator[Member]:
    """Yield the members of an open tar in order; raises DamagedError if a header or the end is invalid."""
    place, end = 0, os.fstat(descriptor).st_size
    of_all, of_next, last = dict[bytes, bytes](), dict[bytes, bytes](), Member(b"", 0, 0, False, "")
    while (header := _header(descriptor, place)) is not None:
        if header.kind in _EXTENSIONS:
            content = _extension(descriptor, header)
            if header.kind == _LONG_NAME:
                of_next[b"path"] = content.partition(b"\0")[0]
            elif header.kind == _RECORDS_FOR_ALL:
                of_all |= _records(content, header)
            elif header.kind in _RECORDS:
                of_next |= _records(content, header)
            place = header.end + _whole_blocks(header.size)
            continue
        offset = _end_of_sparse_map(descriptor, header) if header.kind == _SPARSE else header.end
        member = _member(header, offset, of_all | of_next)
        if member.offset + member.size > end:
            raise _cut(header)
        yield member
        place, of_next, last = member.offset + _whole_blocks(member.size), {}, member
    if of_next:
        raise DamagedError(f"is damaged: zeros at byte {place} for the header of a member")
    _check_end(descriptor, place, end, last)


def _member(header: _Header, offset: int, extended: Mapping[bytes, bytes]) -> Member:
    """Return the member of a header; extension headers override name and size."""
    name = extended.get(b"GNU.sparse.name") or extended.get(b"path") or header.name
    is_folder = header.kind == _FOLDER or (header.kind == _OLD_FILE and name.endswith(b"/"))
    size = extended.get(b"size") or b"%d" % header.size
    if not _NUMBER.fullmatch(size):
        raise _damaged(header.place)
    return Member(
        name,
        offset,
        0 if is_folder or header.kind in _WITHOUT_CONTENT else int(size),
        is_folder,
        _problem(header.kind, b"GNU.sparse" in extended),
    )


def _problem(kind: bytes, is_sparse: bool) -> str:
    if is_sparse or kind == _SPARSE:
        return "a sparse file in its tar: pack without tar --sparse"
    return "" if kind in _FILES else _LINKS.get(kind, "not a plain file in its tar")


def _header(descriptor: int, place: int) -> _Header | None:
    """Return the header at an offset, None if the block is all zeros."""
    block = os.pread(descriptor, TAR_BLOCK, place)
    if place == 0:
        _check_packed(block)
    if len(block) < TAR_BLOCK:
        raise DamagedError(f"ends at byte {place + len(block)} without the zeros that end a tar: an incomplete copy")
    if not any(block):
        return None
    if _octal(block[_CHECKSUM], place) not in _checksums(block):
        raise _damaged(place)
    name = block[_NAME].partition(b"\0")[0]
    prefix = block[_PREFIX].partition(b"\0")[0] if block[_MAGIC] == b"ustar\0" else b""
    return _Header(place, block, prefix + b"/" + name if prefix else name, block[_KIND], _size(block[_SIZE], place))


def _checksums(block: bytes) -> tuple[int, int]:
    """Return the checksums of a header, with spaces as checksum field: of unsigned and of signed bytes."""
    rest = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    total = sum(rest) + 8 * ord(" ")
    return total, total - 256 * sum(byte >= 128 for byte in rest) if not rest.isascii() else total


def _size(field: bytes, place: int) -> int:
    """Return a size: octal digits or, from 8 GiB on, binary."""
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field, place)
    if size >= 1 << 63:
        raise _damaged(place)
    return size


def _octal(field: bytes, place: int) -> int:
    match = _OCTAL_NUMBER.fullmatch(field)
    if match is None:
        raise _damaged(place)
    return int(match[1] or b"0", 8)


def _extension(descriptor: int, header: _Header) -> bytes:
    """Return the content of an extension header."""
    if header.size > _MAX_EXTENSION:
        raise _damaged(header.place)
    content = os.pread(descriptor, header.size, header.end)
    if len(content) < header.size:
        raise _cut(header)
    return content


def _records(content: bytes, header: _Header) -> dict[bytes, bytes]:
    """Return name, size and sparseness from PAX records.

    A record is `LENGTH KEYWORD=VALUE` and a line feed; LENGTH is the length of all of it.
    """
    records, place = dict[bytes, bytes](), 0
    while place < len(content) and content[place]:
        digits = _NUMBER.match(content, place)
        end = place + int(digits[0]) if digits else place
        record = content[digits.end() : end] if digits else b""
        keyword, equals, value = record[1:-1].partition(b"=")
        if end > len(content) or not equals or record[:1] != b" " or record[-1:] != b"\n":
            raise _damaged(header.place)
        if keyword.startswith(b"GNU.sparse."):
            records[b"GNU.sparse"] = b"yes"
        if keyword in (b"path", b"size", b"GNU.sparse.name"):
            records[keyword] = value
        place = end
    return records


def _end_of_sparse_map(descriptor: int, header: _Header) -> int:
    """Return the offset of the content of a sparse member in the old GNU format, after the blocks of its map."""
    place, goes_on = header.end, header.block[_SPARSE_MAP_GOES_ON]
    while goes_on:
        block = os.pread(descriptor, TAR_BLOCK, place)
        if len(block) < TAR_BLOCK:
            raise _cut(header)
        place, goes_on = place + TAR_BLOCK, block[_SPARSE_BLOCK_GOES_ON]
    return place


def _check_end(descriptor: int, place: int, end: int, last: Member) -> None:
    """Raise DamagedError unless only zeros follow the `last` member, at most as many as tar writes."""
    if not _is_zero(descriptor, place, min(end, place + _RECORD_SIZES[-1] + TAR_END)):
        raise DamagedError(
            f"is damaged: zeros at byte {place} for a header, but content behind them"
            " (were tars joined by cat? Then convert a folder of them)"
        )
    if end - place <= _MAX_END:
        return
    is_padding = any(end % record == 0 and end - place < record + TAR_END for record in _RECORD_SIZES)
    tail = last.offset + max(0, last.size - _TAIL)
    if not is_padding or (last.size and _is_zero(descriptor, tail, last.offset + last.size)):
        raise DamagedError(
            f"has nothing but zeros from byte {place} on, more than tar writes: an incomplete copy"
            " (if tar -t lists all its files, unpack it and pack it again without tar -b)"
        )


def _is_zero(descriptor: int, place: int, end: int) -> bool:
    """Return whether all bytes from `place` to `end` are zero."""
    while place < end and (chunk := os.pread(descriptor, min(_CHUNK, end - place), place)):
        if chunk.strip(b"\0"):
            return False
        place += len(chunk)
    return True


def _check_packed(block: bytes) -> None:
    for magic, remedy in _PACKED.items():
        if block.startswith(magic):
            raise DamagedError(f"is compressed, so that nothing in it can be found by place: {remedy} it first")


def _whole_blocks(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _damaged(place: int) -> DamagedError:
    return DamagedError(f"is damaged, or no tar: no sound header at byte {place}")


def _cut(header: _Header) -> DamagedError:
    return DamagedError(f"ends in the member at byte {header.place}: an incomplete copy")
