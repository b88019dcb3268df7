"""The interface of all sources: list entries in order without reading them, and read them one by one."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shards.common.errors import UserError
from shards.common.files import read_named
from shards.common.redaction import printable

MAX_ENTRY_BYTES = 1 << 28
"""Largest entry in bytes; larger ones are rejected before memory is allocated."""


_ARCHIVE = re.compile(rb"(?:.*/)?[^./][^/]*\.(tar(\.\w+)?|tgz|tbz2?|txz|tzst|zip)", re.IGNORECASE | re.DOTALL)

_NAMES_SHOWN = 3


class LeftOut:
    """Files that a walk left out for having no image name: their number, and the first names and archive, sorted."""

    def __init__(self) -> None:
        self.count, self.names, self.archive = 0, list[bytes](), b""

    def add(self, name: bytes) -> None:
        """Count the file of that name."""
        self.count += 1
        if len(self.names) < _NAMES_SHOWN or name < self.names[-1]:
            self.names = sorted([*self.names, name])[:_NAMES_SHOWN]
        if _ARCHIVE.fullmatch(name):
            self.archive = min(self.archive or name, name)


class Source(Protocol):
    """Encoded images by key. Sources can be pickled; each process opens its own files."""

    key_rule: str
    """How a key follows from a name, and what to do if two entries have one key."""
    archive_rule: str
    """What to do with an archive in the source."""
    left_out: LeftOut
    """Files that the last walk left out."""

    def describe(self) -> dict[str, Any]:
        """Return the source's `kind` and `name` for the manifest."""

    def state(self) -> Any:
        """Return a JSON value that differs if the source is another one of this name or has changed."""

    def entries(self) -> int | None:
        """Return the number of entries, or None if a walk would be needed to count them."""

    def walk(self) -> Iterator[tuple[bytes, Any]]:
        """Yield (key, place) of every entry, always in the same order, without listing all of them first."""

    def holds(self, key: bytes) -> bool | None:
        """Return whether there is an entry of that key, None if a walk would be needed to know."""

    def name(self, key: bytes, place: Any) -> bytes:
        """Return the full name of an entry, for messages."""

    def read(self, key: bytes, place: Any) -> bytes:
        """Return the encoded image of an entry; raises ImageError if it cannot be an image."""


class Entry(NamedTuple):
    """One encoded image of one of the sources."""

    source: int
    key: bytes
    place: Any


class Selection(NamedTuple):
    """Selection of entries: the first `limit` whose keys are not in `exclude`.

    With several sources, a key in `exclude` may have its source's number as prefix (`1_name`) or not.
    """

    exclude: frozenset[bytes] = frozenset()
    limit: int | None = None

    @property
    def exclude_sha256(self) -> str | None:
        """SHA-256, in hex, of the sorted excluded keys, None if there are none."""
        return hashlib.sha256(b"\n".join(sorted(self.exclude))).hexdigest() if self.exclude else None


class Walk:
    """Iterates over the selected entries, source after source, and counts them."""

    def __init__(self, sources: Sequence[Source], selection: Selection) -> None:
        self.taken = [0] * len(sources)
        """Number of entries taken from each source."""
        self.excluded = 0
        self.digest = hashlib.sha256()
        """Of the keys and places of the entries taken, which are the same for all parts of a conversion."""
        self._sources, self._selection = sources, selection
        self._found, self._first_key = set[bytes](), b""

    def runs(self, length: int) -> Iterator[list[Entry]]:
        """Yield the entries in runs of `length`; the last run may be shorter."""
        entries = islice(self._entries(), self._selection.limit)
        while run := list(islice(entries, length)):
            yield run

    def _entries(self) -> Iterator[Entry]:
        exclude = self._selection.exclude
        for index, source in enumerate(self._sources):
            number = b"%d_" % index if len(self._sources) > 1 else b""
            for key, place in source.walk():
                self._first_key = self._first_key or key
                if found := exclude & {key, number + key}:
                    self._found |= found
                    self.excluded += 1
                else:
                    self.taken[index] += 1
                    entry = Entry(index, key, place)
                    self.digest.update(repr(entry).encode())
                    yield entry

    def check_keys(self) -> None:
        """Raise UserError if no entry has any of the keys to exclude, as far as that is known without a walk."""
        exclude = self._selection.exclude
        if not exclude or self._selection.limit is not None:
            return
        for index, source in enumerate(self._sources):
            number = b"%d_" % index if len(self._sources) > 1 else b""
            if any(source.holds(key) is not False or source.holds(key.removeprefix(number)) for key in exclude):
                return
        self._first_key, _ = next(self._sources[0].walk())
        self.check_exclusion()

    def check_exclusion(self) -> str | None:
        """Return a line about keys to exclude that no entry has, None if there are none.

        Call it after the last run. Raises UserError if no entry has any of them, unless the limit ended the walk.
        """
        listed = self._selection.exclude
        missing = listed - self._found
        if not missing:
            return None
        shown = ", ".join(map(_shown, sorted(missing)[:_NAMES_SHOWN]))
        if sum(self.taken) == self._selection.limit:
            return f"--exclude: {len(missing):,} of {len(listed):,} keys are not in the part that --max-images leaves"
        line = (
            f"--exclude: no entry has {len(missing):,} of the {len(listed):,} keys ({shown}); "
            f"keys are written as those of the source, such as {as_text(self._first_key)}"
        )
        if not self._found:
            raise UserError(line)
        return line


def as_text(name: bytes) -> str:
    """Return a key or a file name for a message: what is not UTF-8 or not printable is escaped."""
    return printable(name.decode(errors="backslashreplace"))


def _shown(key: bytes) -> str:
    """Return a listed key as text, in quotes if it begins or ends with blanks, which belong to it."""
    return as_text(key) if key == key.strip() else f"'{as_text(key)}'"


def read_keys(path: Path) -> frozenset[bytes]:
    """Return the keys in a file, one per line, with any blanks; raises UserError if it cannot be read.

    The file is UTF-8, with or without a byte order mark, UTF-16 with one, or any bytes.
    """
    try:
        keys = _without_mark(read_named(path, None)).splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return frozenset(keys) - {b""}


def _without_mark(content: bytes) -> bytes:
    """Return a text without its byte order mark, in UTF-8 if the mark is that of UTF-16."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16").encode()
        except UnicodeError:  # a key of these bytes
            return content
    return content.removeprefix(codecs.BOM_UTF8)
