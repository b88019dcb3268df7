"""Choose the source class for each path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shards.common.errors import UserError
from shards.common.files import open_plain
from shards.conversion.reports import FOLDER_NAME as UNFINISHED
from shards.conversion.sources.entries import Source
from shards.conversion.sources.folder_source import FolderNames, FolderSource, is_image_name
from shards.conversion.sources.lmdb_source import DATA_NAME, LmdbSource
from shards.conversion.sources.tar_source import TarSource, is_tar_name
from shards.manifest import TAR_BLOCK, read_manifest

_KINDS = {"image": "images", "tar": "tars", "LMDB": "an LMDB"}


def open_sources(paths: Sequence[Path]) -> list[Source]:
    """Return the sources at `paths`; raises UserError for an unusable one, or if they have images in common."""
    sources, folders, files = [open_source(path) for path in paths], FolderNames(), dict[str, Path]()
    for source in sources:
        for path in _paths_of(source):
            if isinstance(source, FolderSource):
                other = folders.add(os.fsencode(path))
            else:
                other = str(files.get(real := os.path.realpath(path), ""))
                files[real] = path
            if other:
                raise UserError(f"{path} holds the images of {other} a second time: leave one of them out")
    roots = [source for source in sources if isinstance(source, FolderSource)]
    for root in roots:
        root.others = tuple(other.path for other in roots if other is not root)
    return sources


def _paths_of(source: Source) -> list[Path]:
    if isinstance(source, TarSource):
        return source.paths
    assert isinstance(source, (FolderSource, LmdbSource)), source
    return [source.path]


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
        if is_tar_name(path) or _is_tar(path):
            return TarSource(path)
        if is_image_name(os.fsencode(path)):
            raise UserError(f"{path} is one image: give the folder that holds it")
        return _open_lmdb(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder: give an LMDB, a tar, or a folder of images or tars")
    if any(any(path.glob(pattern)) for pattern in (DATA_NAME, f"*/{DATA_NAME}", "*_lmdb.zip")):
        source: LmdbSource | TarSource = _open_lmdb(path)
    elif _holds_tars(path):
        source = TarSource(path)
    else:
        return FolderSource(path)
    _refuse_others(path, "LMDB" if isinstance(source, LmdbSource) else "tar")
    return source


def _is_tar(path: Path) -> bool:
    """Return whether a file is a tar by its content, whatever its name."""
    with open_plain(path) as file:
        return file.read(TAR_BLOCK)[257:262] == b"ustar"


def _open_lmdb(path: Path) -> LmdbSource:
    source = LmdbSource(path)
    source.check_sizes()
    return source


def _holds_tars(path: Path) -> bool:
    """Return whether a folder contains tars; raises UserError if it contains both tars and images."""
    with os.scandir(path) as entries:
        first = {kind: entry.name for entry in entries if (kind := _kind(entry.name))}
    if len(first) > 1:
        raise UserError(f"{path} holds both images ({first['image']}) and tars ({first['tar']}): part them")
    return "tar" in first


def _refuse_others(path: Path, kind: str) -> None:
    """Raise UserError for an image, tar or LMDB in or below a folder, except those of its own `kind` directly in it."""
    folders, seen = [os.fspath(path)], set[tuple[int, int]]()
    while folders:
        folder = folders.pop()
        with suppress(OSError), os.scandir(folder) as entries:  # some cannot be read, such as lost+found
            status = os.stat(folder)
            if (identity := (status.st_dev, status.st_ino)) in seen or (seen and _is_data_set(Path(folder))):
                continue
            seen.add(identity)
            for entry in entries:
                if _is_folder(entry):
                    folders += [] if entry.name.startswith(".") else [entry.path]
                elif _kind(entry.name) and not (len(seen) == 1 and _kind(entry.name) == kind):
                    raise UserError(
                        f"{path} holds both {_KINDS[kind]} and {_KINDS[_kind(entry.name)]} ({entry.path}), which would "
                        "be left out: part them"
                    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _is_data_set(folder: Path) -> bool:
    """Return whether a folder is the output of a conversion, finished or not, which may be below its source."""
    if (folder / UNFINISHED).is_dir():
        return True
    with suppress(UserError):
        read_manifest(folder)
        return True
    return False


def _kind(name: str) -> str:
    """Return the kind of source that a file name is one of, empty if none."""
    if name == DATA_NAME:
        return "LMDB"
    if is_tar_name(Path(name)):
        return "tar"
    return "image" if is_image_name(os.fsencode(name)) else ""
