"""Read the pages of an untrusted LMDB; every number is checked before use.

The lmdb library does not do for other people's files: it maps the file into memory and trusts it, so that a page that
an incomplete copy left zeroed, or that a writer reuses, kills the process (assertion, SIGBUS). Supported is the subset
of the format (LMDB 0.9, 64 bits, little-endian) that LSUN uses: one database with one value per key.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shards.common.errors import UserError
from shards.common.files import leads_to_own, open_plain

_PAGE = struct.Struct("<QHHHH")
"""Page header: number, unused, flags, end of node pointers, start of nodes."""
_OVERFLOW_PAGES = struct.Struct("<12xI")
"""Number of pages of a value that has its own pages."""
_NODE = struct.Struct("<HHHH")
"""Node header: low and high half of a size or page number, flags, key length."""
_META = struct.Struct("<8x2xH4xII16xI44x4xHH24xQQQQ")
"""Page flags; magic, version; page size; the database's flags, depth, entries, root; last page, transaction."""
_NUMBER = struct.Struct("<Q")

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE, _KINDS = 1, 2, 4, 8, 0x6F
_BIG, _DATABASE = 1, 2
_NO_PAGE = 2**64 - 1
_FIRST_PAGE = 2
_MAX_DEPTH = 32


class Snapshot(NamedTuple):
    """The last committed transaction."""

    transaction: int
    page_bytes: int
    entries: int
    depth: int
    root: int
    last_page: int

    @property
    def file_bytes(self) -> int:
        """Minimum size of the file in bytes."""
        return (self.last_page + 1) * self.page_bytes


class ValueLocation(NamedTuple):
    """Location of a value: page, byte offset in it, size in bytes."""

    page: int
    offset: int
    size: int


class LmdbFile:
    """An open data.mdb. Methods raise UserError if it is damaged, changed, unreadable or of an unsupported form."""

    def __init__(self, path: Path, expected: Snapshot | None = None) -> None:
        """Open the file `path`; raises OSError if that fails, UserError if its snapshot is not `expected`, if given.

        No readahead: an LMDB filled in random key order (SHA-1) scatters its values, and reading 128 KiB around each
        value of 14 KiB costs more than larger reads save when the values are in order.
        """
        self._path, self._file = path, open_plain(path)
        try:
            if not leads_to_own(path, os.fstat(self._file.fileno())):
                raise UserError(f"{path} is another user's link to a file that is not his: remove it")
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            self.snapshot = self._latest()
            size = os.fstat(self._file.fileno()).st_size
            if size < self.snapshot.file_bytes:
                raise UserError(
                    f"{path} has {size} bytes of {self.snapshot.file_bytes}: an incomplete copy, copy or unzip it again"
                )
            if self.snapshot != (expected or self.snapshot):
                raise self._changed()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def walk(self) -> Iterator[tuple[bytes, ValueLocation]]:
        """Yield (key, place) of every entry, in key order."""
        found, previous = 0, b""
        levels = [iter([] if self.snapshot.root == _NO_PAGE else [self.snapshot.root])]
        while levels:
            number = next(levels[-1], None)
            if number is None:
                levels.pop()
            elif len(levels) < self.snapshot.depth:
                levels.append(iter([child for _, child in self._children(number)]))
            else:
                for key, place in self._entries(number):
                    if key <= previous:
                        raise self._damaged(f"is damaged: the keys of page {number} are out of order")
                    found, previous = found + 1, key
                    yield key, place
        if found != self.snapshot.entries:
            raise self._damaged(f"is damaged: its header counts {self.snapshot.entries:,} entries, it has {found:,}")

    def find(self, key: bytes) -> ValueLocation | None:
        """Return the location of a key's value, None if there is no such key."""
        number = self.snapshot.root
        if number == _NO_PAGE:
            return None
        for _ in range(self.snapshot.depth - 1):
            first, *others = self._children(number)
            number = next((child for begin, child in reversed(others) if begin <= key), first[1])
        return dict(self._entries(number)).get(key)

    def read(self, place: ValueLocation) -> bytes:
        """Return the value at a location."""
        data = self._bytes(place.page * self.snapshot.page_bytes, place.offset + place.size)
        number, _, flags, _, _ = _PAGE.unpack_from(data)
        is_big = place.offset == _PAGE.size
        room = _OVERFLOW_PAGES.unpack_from(data)[0] * self.snapshot.page_bytes if is_big else self.snapshot.page_bytes
        if number != place.page or flags & _KINDS != (_OVERFLOW if is_big else _LEAF) or room < len(data):
            raise self._damaged(f"is damaged in page {place.page}")
        return data[place.offset :]

    def _latest(self) -> Snapshot:
        first = self._snapshot(self._pread(0, _META.size))
        second = self._snapshot(self._pread(first.page_bytes, _META.size))
        return max(first, second)

    def _pread(self, offset: int, count: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), count, offset)
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error.strerror}") from None

    def _bytes(self, offset: int, count: int) -> bytes:
        """Return bytes of the snapshot, whose pages do not change until the next transaction is committed."""
        data = self._pread(offset, count)
        while len(data) < count and (more := self._pread(offset + len(data), count - len(data))):
            data += more
        if self._latest() != self.snapshot:
            raise self._changed()
        if len(data) < count:
            raise self._damaged(f"ends before byte {offset + count}: an incomplete copy")
        return data

    def _nodes(self, number: int, kind: int) -> tuple[bytes, tuple[int, ...]]:
        """Return a page and the offsets of its nodes."""
        if not _FIRST_PAGE <= number <= self.snapshot.last_page:
            raise self._damaged(f"is damaged: it refers to page {number}, which it does not have")
        page = self._bytes(number * self.snapshot.page_bytes, self.snapshot.page_bytes)
        found, _, flags, lower, upper = _PAGE.unpack_from(page)
        count, odd = divmod(lower - _PAGE.size, 2)
        if found != number or flags & _KINDS != kind or odd or count < 1 or not lower <= upper <= len(page):
            raise self._damaged(f"is damaged in page {number}")
        places = struct.unpack_from(f"<{count}H", page, _PAGE.size)
        if min(places) < upper or max(places) > len(page) - _NODE.size:
            raise self._damaged(f"is damaged in page {number}")
        return page, places

    def _children(self, number: int) -> list[tuple[bytes, int]]:
        """Return (lower bound of its keys, page number) of every page below a branch page."""
        page, places = self._nodes(number, _BRANCH)
        found = []
        for place in places:
            low, high, highest, key_bytes = _NODE.unpack_from(page, place)
            begin = place + _NODE.size
            found.append((page[begin : begin + key_bytes], low | high << 16 | highest << 32))
        return found

    def _entries(self, number: int) -> list[tuple[bytes, ValueLocation]]:
        page, places = self._nodes(number, _LEAF)
        found = []
        for place in places:
            low, high, flags, key_bytes = _NODE.unpack_from(page, place)
            start, size = place + _NODE.size + key_bytes, low | high << 16
            if flags == _BIG and start + _NUMBER.size <= len(page):
                value = ValueLocation(_NUMBER.unpack_from(page, start)[0], _PAGE.size, size)
            elif flags == 0 and start + size <= len(page):
                value = ValueLocation(number, start, size)
            elif flags == _DATABASE:
                raise UserError(
                    f"{self._path} is an LMDB that holds databases within its own; only the outer one is read"
                )
            else:
                raise self._damaged(f"is damaged in page {number}")
            end = value.page * self.snapshot.page_bytes + value.offset + value.size
            if not key_bytes or value.page < _FIRST_PAGE or end > self.snapshot.file_bytes:
                raise self._damaged(f"is damaged in page {number}")
            found.append((page[place + _NODE.size : start], value))
        return found

    def _snapshot(self, meta: bytes) -> Snapshot:
        """Return the snapshot of one of the two meta pages."""
        if len(meta) < _META.size:
            raise self._damaged("is not an LMDB: it ends in its first pages")
        kind, magic, version, page_bytes, flags, depth, entries, root, last_page, transaction = _META.unpack(meta)
        if kind & _META_PAGE == 0 or magic != _MAGIC:
            raise self._damaged("is not an LMDB, or its first pages are damaged")
        if version != _VERSION:
            raise UserError(f"{self._path} is an LMDB of format {version}; format {_VERSION} is read")
        is_page_size = 256 <= page_bytes <= 32768 and page_bytes & (page_bytes - 1) == 0
        too_many = entries * _NODE.size > (last_page + 1) * page_bytes
        if not is_page_size or too_many or depth > _MAX_DEPTH or (root == _NO_PAGE) != (depth == 0):
            raise self._damaged("is damaged in its first pages")
        if flags:
            raise UserError(
                f"{self._path} is an LMDB of several values a key, or of keys in another order; neither is read"
            )
        return Snapshot(transaction, page_bytes, entries, depth, root, last_page)

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._path} {reason}; copy or unzip it again")

    def _changed(self) -> UserError:
        return UserError(f"the LMDB {self._path.parent} changed while it was read: wait until nobody writes to it")
