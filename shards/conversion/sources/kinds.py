"""Choose the source class for a path."""

from __future__ import annotations

import os
from pathlib import Path

from shards.common.errors import UserError
from shards.conversion.sources.entries import Source
from shards.conversion.sources.folder_source import FolderSource, is_image_name
from shards.conversion.sources.lmdb_source import DATA_NAME, LmdbSource
from shards.conversion.sources.tar_source import TarSource, is_tar_name


def open_source(path: Path) -> Source:
    """Return the source at `path`: an LMDB, a tar, a folder of tars, or a folder of images.

    Raises UserError, with the remedy, if it is none of them.
    """
    try:
        return _open(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _open(path: Path) -> Source:
    if not path.exists():
        raise UserError(f"no source at {path}: no such file or directory")
    if path.is_file():
        return TarSource(path) if is_tar_name(path) else LmdbSource(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder: give an LMDB, a tar, or a folder of images or tars")
    if any(any(path.glob(pattern)) for pattern in (DATA_NAME, f"*/{DATA_NAME}", "*_lmdb.zip")):
        return LmdbSource(path)
    return TarSource(path) if _holds_tars(path) else FolderSource(path)


def _holds_tars(path: Path) -> bool:
    """Return whether a folder contains tars; raises UserError if it contains both tars and images."""
    with os.scandir(path) as entries:
        first = {kind: entry.name for entry in entries if (kind := _kind(entry.name))}
    if len(first) > 1:
        raise UserError(f"{path} holds both images ({first['image']}) and tars ({first['tar']}): part them")
    return "tar" in first


def _kind(name: str) -> str:
    if is_tar_name(Path(name)):
        return "tar"
    return "image" if is_image_name(os.fsencode(name)) else ""
