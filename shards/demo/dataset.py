"""Write a demo data set without a download: rendered bedrooms in an LMDB like LSUN's."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import lmdb

from shards.common.errors import UserError
from shards.common.files import sync_directory
from shards.common.locks import Lock, NoLocksError
from shards.common.workers import Tick, map_in_order
from shards.demo.bedroom import render_bedroom

Record: TypeAlias = tuple[bytes, bytes]
"""An LMDB key and its value."""

CHUNK = 50  # pictures per task of a worker and per transaction
MAP_BYTES_PER_PICTURE = 1 << 16  # larger than any JPEG of this size; the file grows only as needed

MOST_IMAGES = 1 << 30
"""LMDB maps the whole file; twice as many would not fit into the addresses of a process."""


def write_demo(
    out: Path,
    images: int = 4000,
    seed: int = 0,
    workers: int = 0,
    advance: Tick = lambda images: None,
) -> Path:
    """Write `images` bedrooms to the LMDB `out`/demo_train_lmdb and return that path.

    The images depend on `seed`, not on `workers` (0: one per core). `advance` is called with
    the number of images just done. The folder is renamed into place when complete; raises UserError if it exists.
    """
    target = out / "demo_train_lmdb"
    jobs = (range(start, min(start + CHUNK, images)) for start in range(0, images, CHUNK))
    chunks = map_in_order(partial(_render_chunk, seed), jobs, workers, advance)
    with _new_folder(target) as folder, closing(chunks):
        _write_lmdb(folder, images, chunks)
    return target


def _render_chunk(seed: int, indices: range, tick: Tick) -> list[Record]:
    records = []
    for index in indices:
        buffer = io.BytesIO()
        render_bedroom(seed, index).save(buffer, "JPEG", quality=75)
        value = buffer.getvalue()
        records.append((hashlib.sha1(value).hexdigest().encode("ascii"), value))
        tick(1)
    return records


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `target` at the end.

    It is removed if the block raises; what a killed process left, at the next start.
    """
    temporary = target.with_name(f".{target.name}.partial")
    _refuse_existing(target)
    with _claim(target):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        except OSError as error:
            raise _unwritable(target, error) from None
        try:
            yield temporary
            _refuse_existing(target)  # again: rename would replace an empty folder
            temporary.rename(target)
            sync_directory(target.parent)
        except lmdb.Error as error:
            raise UserError(f"cannot write {target} ({error}): make room or choose another folder") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _claim(target: Path) -> Iterator[None]:
    """Lock the temporary folder of `target`; raises UserError if another process has locked it."""
    path = target.with_name(f".{target.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = Lock(path)
    except OSError as error:
        raise _unwritable(target, error) from None
    with lock:
        try:
            taken = lock.take()
        except NoLocksError as error:
            raise _unwritable(target, error) from None
        if not taken:
            raise UserError(f"another process is writing {target}: wait for it, or choose another folder")
        yield
        path.unlink(missing_ok=True)  # safe: a process that opened it finds `target`


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to {target.parent} ({error.strerror}): choose another folder")


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: move it away or choose another folder")


def _write_lmdb(folder: Path, images: int, chunks: Iterable[list[Record]]) -> None:
    map_size = (images + 1024) * MAP_BYTES_PER_PICTURE
    with lmdb.open(os.fsencode(folder), map_size=map_size, sync=False) as environment:
        for records in chunks:
            with environment.begin(write=True) as transaction:
                transaction.cursor().putmulti(records)
        environment.sync(True)
        assert environment.stat()["entries"] == images, "two pictures have the same SHA-1"
