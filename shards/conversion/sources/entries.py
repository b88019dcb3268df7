"""What every kind of source gives: entries, walked in order without being read, and read one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shards.common.errors import UserError

MAX_ENTRY_BYTES = 1 << 28
"""Encoded images are smaller; a larger entry is rejected before memory is spent on it."""


class Source(Protocol):
    """Encoded images under keys. It pickles: each process that reads opens its own."""

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source: its kind and its name."""

    ignored: int
    """What the last walk met that does not call itself an image."""

    def state(self) -> Any:
        """Return what tells this source from another of its name and from its own earlier self, as JSON knows it."""

    def entries(self) -> int | None:
        """Return the number of entries where the source knows it without a walk."""

    def walk(self) -> Iterator[tuple[bytes, Any]]:
        """Yield (key, place) of every entry, always in the same order, without listing all of them first."""

    def read(self, key: bytes, place: Any) -> bytes:
        """Return the encoded image of an entry; raises ImageError where it is none."""


class Entry(NamedTuple):
    """One encoded image of one of the sources."""

    source: int
    key: bytes
    place: Any


class Selection(NamedTuple):
    """Which entries are taken: not those whose key is in `exclude`, and the first `limit` of the others.

    With several sources, a key may be given with or without the number of its source in front.
    """

    exclude: frozenset[bytes] = frozenset()
    limit: int | None = None

    @property
    def exclude_sha256(self) -> str | None:
        """Hash of the keys that are not taken, None where there are none."""
        return hashlib.sha256(b"\n".join(sorted(self.exclude))).hexdigest() if self.exclude else None


class Walk:
    """The entries that are taken, source after source, and what came of the walk so far."""

    def __init__(self, sources: Sequence[Source], selection: Selection) -> None:
        self.taken = [0] * len(sources)
        """Entries taken from each source."""
        self.excluded = 0
        self._sources, self._selection = sources, selection

    def runs(self, length: int) -> Iterator[list[Entry]]:
        """Yield the entries in runs of `length`, the last one shorter."""
        entries = islice(self._entries(), self._selection.limit)
        while run := list(islice(entries, length)):
            yield run

    def _entries(self) -> Iterator[Entry]:
        exclude = self._selection.exclude
        for index, source in enumerate(self._sources):
            number = b"%d_" % index if len(self._sources) > 1 else b""
            for key, place in source.walk():
                if key in exclude or (number + key) in exclude:
                    self.excluded += 1
                else:
                    self.taken[index] += 1
                    yield Entry(index, key, place)


def read_keys(path: Path) -> frozenset[bytes]:
    """Return the keys in a file, one a line; raises UserError where it cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return frozenset({*lines, *(line.strip() for line in lines)} - {b""})  # a key may end in a blank
