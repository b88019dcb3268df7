"""Which kind of source a path is."""

from __future__ import annotations

from pathlib import Path

from shards.entries import Source
from shards.errors import UserError
from shards.folder_source import FolderSource
from shards.lmdb_source import DATA_NAME, LmdbSource
from shards.tar_source import TarSource


def open_source(path: Path) -> Source:
    """Return the source at `path`: an LMDB, a tar, a folder of tars, or a folder of images.

    Raises UserError, with the remedy, where it is none of them.
    """
    if not path.exists():
        raise UserError(f"no source at {path}: no such file or directory")
    if path.is_file():
        return TarSource(path) if path.suffix == ".tar" else LmdbSource(path)
    if any(path.glob("*.tar")):
        return TarSource(path)
    holds_lmdb = any(any(path.glob(pattern)) for pattern in (DATA_NAME, f"*/{DATA_NAME}", "*_lmdb.zip"))
    return LmdbSource(path) if holds_lmdb else FolderSource(path)
