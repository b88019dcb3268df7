"""The interface of all sources: list entries in order without reading them, and read them one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shards.common.errors import UserError

MAX_ENTRY_BYTES = 1 << 28
"""Largest entry in bytes; larger ones are rejected before memory is allocated."""


class Source(Protocol):
    """Encoded images by key. Sources can be pickled; each process opens its own files."""

    def describe(self) -> dict[str, Any]:
        """Return the source's `kind` and `name` for the manifest."""

    ignored: int
    """Files that the last walk left out for having no image name."""

    def state(self) -> Any:
        """Return a JSON value that differs if the source is another one of this name or has changed."""

    def entries(self) -> int | None:
        """Return the number of entries, or None if a walk would be needed to count them."""

    def walk(self) -> Iterator[tuple[bytes, Any]]:
        """Yield (key, place) of every entry, always in the same order, without listing all of them first."""

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
        self._sources, self._selection = sources, selection

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
                if key in exclude or (number + key) in exclude:
                    self.excluded += 1
                else:
                    self.taken[index] += 1
                    yield Entry(index, key, place)


def read_keys(path: Path) -> frozenset[bytes]:
    """Return the keys in a file, one per line; raises UserError if it cannot be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return frozenset({*lines, *(line.strip() for line in lines)} - {b""})  # a key may end in a space
