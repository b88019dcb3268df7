"""Images from an LMDB, as LSUN publishes them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from shards.errors import UserError
from shards.files import state_of

DATA_NAME = "data.mdb"


class LmdbSource:
    """An LMDB of encoded images, opened when first read, in the process that reads.

    It can be pickled: an environment survives neither a fork nor pickling (pytorch/vision#689), so that a
    copy opens its own. Every method raises UserError where the LMDB is missing, damaged or of another kind.
    """

    ignored = 0
    """An LMDB holds nothing else."""

    def __init__(self, path: Path, transaction: int | None = None) -> None:
        self.path = path
        self._transaction = transaction
        self._environment: lmdb.Environment | None = None

    def __reduce__(self) -> tuple[type[LmdbSource], tuple[Path, int | None]]:
        return LmdbSource, (self.path, self._transaction)

    def __enter__(self) -> LmdbSource:
        return self

    def __exit__(self, *_: object) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source: its kind and name."""
        return {"kind": "lmdb", "name": self.path.resolve().name}

    def state(self) -> Any:
        """Return its place, size and time of change."""
        return state_of(self.path / DATA_NAME)

    def entries(self) -> int:
        """Return the number of entries, at least 1."""
        with _damage_is_user_error(self.path):
            entries = self._open().stat()["entries"]
        if not entries:
            raise UserError(f"the LMDB {self.path} is empty: it has no entries")
        return entries

    def walk(self) -> Iterator[tuple[bytes, None]]:
        """Yield the keys in order. Reads only the pages that hold keys.

        Listing all of LSUN first takes hours (pytorch/vision#2544).
        """
        expected, found = self.entries(), 0
        with _damage_is_user_error(self.path), self._open().begin() as transaction:
            for key in transaction.cursor().iternext(keys=True, values=False):
                found += 1
                yield key, None
        if found != expected:
            raise UserError(f"the LMDB {self.path} is damaged: it lacks entries that its header counts; copy it again")

    def holds(self, key: bytes) -> bool:
        """Return whether there is an entry of that key."""
        with _damage_is_user_error(self.path), self._open().begin() as transaction:
            return bool(transaction.cursor().set_key(key))

    def read(self, key: bytes, place: None = None) -> bytes:
        """Return the value of a key; raises UserError where it is gone or another process writes to the LMDB."""
        with _damage_is_user_error(self.path):
            environment = self._open()
            with environment.begin() as transaction:
                value = transaction.get(key)
            written = environment.info()["last_txnid"] != self._transaction
        if value is None or written:
            raise UserError(f"the LMDB {self.path} changed while it was read: wait until nobody writes to it")
        return value

    def _open(self) -> lmdb.Environment:
        if self._environment is None:
            _check_path(self.path)
            # No lock: nobody writes a published data set, and it may lie on a read-only disk. No readahead:
            # an LMDB filled in random order, as by SHA-1 keys, scatters its values, and reading 128 KiB
            # around each of 14 KiB costs far more than larger reads save where values lie in order.
            environment = lmdb.open(os.fsencode(self.path), readonly=True, lock=False, create=False, readahead=False)
            _check_length(self.path / DATA_NAME, environment)
            if self._transaction is None:
                self._transaction = environment.info()["last_txnid"]
            self._environment = environment
        return self._environment


@contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except lmdb.InvalidError:
        raise UserError(f"{path / DATA_NAME} is not an LMDB, or its first page is damaged") from None
    except lmdb.Error as error:
        raise UserError(f"cannot read the LMDB {path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _check_path(path: Path) -> None:
    """Raise UserError, with the remedy, where `path` is no folder that holds a data.mdb."""
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


def _check_length(data: Path, environment: lmdb.Environment) -> None:
    """Raise UserError where the file ends before its last page: reading that page would kill the process."""
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    size = data.stat().st_size
    if size < expected:
        environment.close()
        raise UserError(f"{data} has {size} bytes of {expected}: an incomplete copy, copy or unzip it again")
