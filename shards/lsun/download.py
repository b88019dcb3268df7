"""LSUN's scenes from their publisher: each archive becomes the folder of its LMDB, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from shards.common.errors import UserError
from shards.common.files import sync_directory
from shards.common.http import discard, fetch
from shards.lsun.archive import ArchiveError, unpack
from shards.lsun.catalog import ADDRESS


def download(name: str, out: Path, address: str = ADDRESS, keep_zip: bool = False) -> bool:
    """Bring the LMDB `name` to the folder `out`/`name`; return False where it was there already.

    Until it is whole, all that lies in `out` has other names, and a later call goes on from it. Raises UserError
    where the server, its archive or the disk does not allow it, or where another process is at it.
    """
    folder = out / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _claim(folder):
            missing = not (folder / "data.mdb").is_file()
            shutil.rmtree(_temporary(folder), ignore_errors=True)
            if missing:
                _bring(folder, f"{address.rstrip('/')}/{name}.zip", keep_zip)
            discard(_part(folder))
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    return missing


def _bring(folder: Path, address: str, keep_zip: bool) -> None:
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} is in the way: it holds no data.mdb; remove it")
    kept, part = folder.with_name(folder.name + ".zip"), _part(folder)
    archive = kept if kept.exists() else part
    if archive == part:
        fetch(address, part)
    try:
        unpack(archive, folder.name, _temporary(folder))
    except ArchiveError as error:
        raise UserError(_damaged(archive, address, error)) from None
    if keep_zip and archive == part:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(kept)  # before the folder has its name, so that a kill in between loses neither
    _temporary(folder).rename(folder)
    sync_directory(folder.parent)


def _damaged(archive: Path, address: str, error: ArchiveError) -> str:
    """Return what to tell of a damaged archive; removes it unless somebody else may have put it there."""
    if archive.suffix == ".zip":
        return f"{archive} cannot be used: {error}; remove it, and the same command downloads it"
    discard(archive)
    return f"{address} cannot be used: {error}; it was removed, and the same command downloads it again"


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Hold what belongs to `folder` against other processes; raises UserError where one of them does."""
    path = folder.with_name(folder.name + ".lock")
    try:
        lock = FileLock(path, timeout=0).acquire()
    except Timeout:
        raise UserError(f"another process is downloading {folder}: wait for it, or give another --out") from None
    except NotImplementedError as error:
        raise UserError(f"cannot lock {path}: {error}; give another --out") from None
    with lock:
        yield
        path.unlink(missing_ok=True)  # all is done: who waits for this very file has nothing left to do


def _part(folder: Path) -> Path:
    return folder.with_name(folder.name + ".zip.part")


def _temporary(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")
