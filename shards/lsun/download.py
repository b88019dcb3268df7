"""Download LSUN's archives and unzip each atomically to the folder of its LMDB."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shards.common.errors import UserError
from shards.common.files import NotPlainError, content_sha256, name_of, open_plain, sync, sync_directory
from shards.common.http import FetchOptions, discard, fetch, file_address
from shards.common.locks import Lock, NoLocksError
from shards.common.messages import tell
from shards.common.ownership import Ownership
from shards.lsun.archive import ArchiveError, unpack
from shards.lsun.catalog import ADDRESS, ARCHIVES, MOST_TEST_BYTES


def download(name: str, out: Path, address: str = ADDRESS, keep_zip: bool = False) -> bool:
    """Download the LMDB `name` to the folder `out`/`name`; return False if it exists already.

    Until it is complete, its files in `out` have temporary names, from which a later call resumes. Raises UserError
    if the server, the archive or the disk fails, or if another process is downloading it.
    """
    folder = out / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _claim(folder):
            missing = not (folder / "data.mdb").is_file()
            shutil.rmtree(_temporary(folder), ignore_errors=True)
            if missing:
                _bring(folder, file_address(address, f"{name}.zip"), keep_zip)
            discard(_part(folder))
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror or error}): mend that and give the same command again, or "
            "another --out"
        ) from None
    return missing


def _bring(folder: Path, address: str, keep_zip: bool) -> None:
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} is in the way: it holds no data.mdb; remove it")
    kept, part = folder.with_name(folder.name + ".zip"), _part(folder)
    archive = kept if kept.exists() else part
    published = ARCHIVES.get(folder.name)
    if archive == part:
        fetch(address, part, FetchOptions(published.bytes if published else MOST_TEST_BYTES))
    try:
        with _opened(archive) as file:  # once: the name may be that of another file by now
            _authenticate(file, folder.name)
            unpack(Path(name_of(file)), folder.name, _temporary(folder))
    except ArchiveError as error:
        raise UserError(_damaged(archive, address, error)) from None
    if keep_zip and archive == part:
        with open_plain(part) as file:
            sync(file.fileno())
        part.replace(kept)  # before the folder is renamed, so that a kill in between loses neither
    _temporary(folder).rename(folder)
    sync_directory(folder.parent)


def _opened(archive: Path) -> BinaryIO:
    """Open an archive; raises UserError if others can change it after it is checked, ArchiveError if it is no file."""
    try:
        file = open_plain(archive)
    except NotPlainError:
        raise ArchiveError("it is no plain file") from None
    if not Ownership.on_disk_of(archive.parent).protects(os.fstat(file.fileno())):
        file.close()
        raise UserError(
            f"{archive} belongs to another user or can be written by others, who could change it after it is checked: "
            f"make it yours alone (`chmod go-w`, or a copy), or remove it, and the same command downloads it"
        )
    return file


def _authenticate(archive: BinaryIO, name: str) -> None:
    """Raise ArchiveError if `archive` is not the one that LSUN published; the server's line may be tapped."""
    published = ARCHIVES.get(name)
    if published is None:
        tell(f"{name}: no checksum of it is published, so only its form is checked")
        return
    size = os.fstat(archive.fileno()).st_size
    if size != published.bytes:
        raise ArchiveError(f"it has {size:,} bytes, LSUN's archive {published.bytes:,}")
    tell(f"{name}: checking its SHA-256")  # minutes for the largest
    found = content_sha256(archive)
    if found != published.sha256:
        raise ArchiveError(f"its SHA-256 is {found}, that of LSUN's archive {published.sha256}")


def _damaged(archive: Path, address: str, error: ArchiveError) -> str:
    """Return the error message for a damaged archive; removes the archive if this program downloaded it."""
    if archive.suffix == ".zip":
        return f"{archive} cannot be used: {error}; remove it, and the same command downloads it"
    discard(archive)
    return f"{address} cannot be used: {error}; it was removed, and the same command downloads it again"


@contextmanager
def _claim(folder: Path) -> Iterator[None]:
    """Lock the files of `folder`; raises UserError if another process has locked them."""
    path = folder.with_name(folder.name + ".lock")
    with Lock(path) as lock:
        try:
            taken = lock.take()
        except NoLocksError as error:
            raise UserError(f"cannot lock {path}: {error.strerror}; give another --out") from None
        if not taken:
            raise UserError(f"another process is downloading {folder}: wait for it, or give another --out")
        yield
        path.unlink(missing_ok=True)  # safe: a process waiting for the lock has no work left


def _part(folder: Path) -> Path:
    return folder.with_name(folder.name + ".zip.part")


def _temporary(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")
