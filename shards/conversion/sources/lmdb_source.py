"""Images from an LMDB as published by LSUN."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.common.errors import UserError
from shards.common.files import state_of
from shards.conversion.images import ImageError
from shards.conversion.sources.entries import MAX_ENTRY_BYTES, LeftOut, as_text
from shards.conversion.sources.lmdb_pages import LmdbFile, Snapshot, ValueLocation

DATA_NAME = "data.mdb"

_LENGTH, _SIZED_KEY = b"length", re.compile(rb"\d+-\d{5,}")
"""Keys of rosinality's StyleGAN2: `128-00000`, `256-00000`, and `length`, the number of pictures."""


class LmdbSource:
    """An LMDB of encoded images, opened at the first read.

    It can be pickled: a copy opens the file itself and checks that it has not changed. Nothing is written or
    locked, as the data set may be on a read-only disk. Every method raises UserError if the LMDB is missing,
    damaged, changed by a writer or of an unsupported form.
    """

    key_rule = "one of them is named by the SHA-1 of its key: rename it"
    archive_rule = "unpack it"

    def __init__(self, path: Path, snapshot: Snapshot | None = None) -> None:
        self.path = path
        self.left_out = LeftOut()
        """Always empty: an LMDB contains nothing but entries."""
        self._snapshot = snapshot
        self._file: LmdbFile | None = None

    def __reduce__(self) -> tuple[type[LmdbSource], tuple[Path, Snapshot | None]]:
        return LmdbSource, (self.path, self._snapshot)

    def __enter__(self) -> LmdbSource:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def describe(self) -> dict[str, Any]:
        """Return the source's `kind` and `name` for the manifest."""
        return {"kind": "lmdb", "name": as_text(os.fsencode(self.path.resolve().name))}

    def state(self) -> Any:
        """Return path, size and mtime of its data.mdb."""
        return state_of(self.path / DATA_NAME)

    def entries(self) -> int:
        """Return the number of entries, at least 1."""
        entries = self._open().snapshot.entries
        if not entries:
            raise UserError(f"the LMDB {self.path} is empty: it has no entries")
        return entries

    def walk(self) -> Iterator[tuple[bytes, ValueLocation]]:
        """Yield (key, place) of every entry in key order. Reads only the pages with keys.

        Listing all keys of LSUN first would take hours (pytorch/vision#2544).
        """
        self.entries()
        yield from self._open().walk()

    def check_sizes(self) -> None:
        """Raise UserError if every picture is there in several sizes: all of them would be converted."""
        found = self._open().find(_LENGTH)
        length = self._open().read(found) if found is not None and found.size < 20 else b""
        if not length.isdigit() or self.entries() <= int(length) + 1:
            return
        first, _ = next(self._open().walk())
        if _SIZED_KEY.fullmatch(first):
            raise UserError(
                f"{self.path} holds its {int(length):,} pictures in several sizes ({first.decode()} and so on): "
                "prepare it again with one size, or export it, remove the files of the other sizes and convert the rest"
            )

    def name(self, key: bytes, place: ValueLocation) -> bytes:
        """Return the key."""
        return key

    def holds(self, key: bytes) -> bool:
        """Return whether there is an entry with that key."""
        return self._open().find(key) is not None

    def read(self, key: bytes, place: ValueLocation) -> bytes:
        """Return the value at a location; raises ImageError if it is larger than MAX_ENTRY_BYTES."""
        if place.size > MAX_ENTRY_BYTES:
            raise ImageError(f"too large: {place.size:,} bytes")
        return self._open().read(place)

    def _open(self) -> LmdbFile:
        if self._file is None:
            try:
                _check_path(self.path)
                self._file = LmdbFile(self.path / DATA_NAME, self._snapshot)
            except OSError as error:
                raise UserError(f"cannot read {self.path / DATA_NAME}: {error.strerror}") from None
            self._snapshot = self._file.snapshot
        return self._file


def _check_path(path: Path) -> None:
    """Raise UserError, with the remedy, if `path` is not a folder with a data.mdb."""
    if not path.exists():
        raise UserError(f"no LMDB at {path}: no such directory")
    if path.is_file():
        remedy = "unzip it first" if zipfile.is_zipfile(path) else f"give the folder that holds {DATA_NAME}"
        raise UserError(f"{path} is a file, not the folder of an LMDB: {remedy}")
    if (path / DATA_NAME).is_file():
        return
    below = sorted(found.parent for pattern in (f"*/{DATA_NAME}", f"*/*/{DATA_NAME}") for found in path.glob(pattern))
    if below:
        raise UserError(f"{path} holds no {DATA_NAME}, but {' and '.join(map(str, below[:3]))} does: give that folder")
    zips = sorted(path.glob("*_lmdb.zip"))
    raise UserError(
        f"{path} is not the folder of an LMDB: no {DATA_NAME} in it" + (f"; unzip {zips[0]}" if zips else "")
    )
