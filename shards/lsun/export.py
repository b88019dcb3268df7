"""Export the values of an LMDB as files, byte for byte, in the folder layout of LSUN's own export."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

from shards.common.errors import UserError
from shards.common.files import atomic_file, read_plain, remove_leftovers, require_own_folder
from shards.common.locks import Lock, NoLocksError
from shards.common.progress import Progress
from shards.conversion.images import ImageError
from shards.conversion.sources.lmdb_pages import ValueLocation
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.manifest import member_key

UNKNOWN = ".bin"
"""Extension of files that are not JPEG, WebP or PNG."""

EXTENSIONS = (".jpg", ".webp", ".png", UNKNOWN)

FOLDER_LEVELS = 6
"""LSUN's layout: nested folders named by the first six characters of a key."""


@dataclass
class ExportReport:
    """Numbers of files: by extension, present before the export, and named by the SHA-1 of their key."""

    extensions: Counter[str] = field(default_factory=Counter)
    present: int = 0
    renamed: int = 0


def export(source: LmdbSource, out: Path, *, flat: bool = False, limit: int | None = None) -> ExportReport:
    """Write every value of `source`, or the first `limit` in key order, to its own file below `out`.

    A file is in nested folders named by its name's first six characters, or in `out` itself if `flat`. Existing
    files with the same bytes are kept, so the same call resumes an interrupted export. Raises UserError if the
    source is unusable, two keys would share a name, a file with other content exists, another export is writing
    to `out`, or the disk fails.
    """
    entries = source.entries()
    count = min(entries, limit or entries)
    report = ExportReport()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        require_own = cache(require_own_folder)  # there are as many folders as the first six characters of keys
        with _held(out), Progress(count, "export") as progress:
            for key, place in islice(source.walk(), count):
                value = _read(source, key, place)
                name, extension = _unique_name(source, key), extension_of(value)
                report.extensions[extension] += 1
                report.renamed += name.encode() != key
                folder = folder_of(name, flat)
                for part in (folder, *folder.parents):
                    require_own(out / part)
                path = out / folder / (name + extension)
                report.present += _store(path, key, value, is_first=report.present == report.extensions.total() - 1)
                progress.advance(1)
            # One sync at the end: fsync of each of three million files would take hours.
            os.sync()
    except OSError as error:
        where = error.filename or out  # an error of write has no filename
        raise UserError(
            f"cannot write {where} ({error.strerror}): mend that and give the same command again, or another --out"
        ) from None
    return report


def _read(source: LmdbSource, key: bytes, place: ValueLocation) -> bytes:
    try:
        return source.read(key, place)
    except ImageError as error:
        raise UserError(f"cannot export key {key!r} of {source.path}: {error}") from None


def folder_of(name: str, flat: bool) -> Path:
    """Return the folder of the file `name`, relative to the export: LSUN's a/b/c/d/e/f, or empty if `flat`."""
    return Path() if flat else Path(*name[:FOLDER_LEVELS])


def extension_of(content: bytes) -> str:
    """Return the extension for `content` from its first bytes; LSUN's own export names every file `.webp`."""
    if content.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return ".webp"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    return UNKNOWN


def _unique_name(source: LmdbSource, key: bytes) -> str:
    """Return the file name of `key`; raises UserError if another key of `source` has the same.

    That happens if `key` is named by its SHA-1 and another key is equal to that hex string.
    """
    name = member_key(key)
    if name.encode() != key and source.holds(name.encode()):
        raise UserError(f"keys {key!r} and {name.encode()!r} of {source.path} would share a name: rename one of them")
    return name


def _store(path: Path, key: bytes, value: bytes, is_first: bool) -> bool:
    """Write `value` to `path` unless it is there; return whether it was; raises UserError if `path` is different.

    A killed export leaves a temporary file only of what would be the first to be written by the next.
    """
    if _is_there(path, key, value):
        return True
    if is_first:
        remove_leftovers(path.parent, path.name.__eq__)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, durable=False) as file:
        file.write(value)
    return False


def _is_there(path: Path, key: bytes, value: bytes) -> bool:
    """Return whether the file `path` contains `value`; raises UserError if it contains something else.

    The start of `value` followed by zeros, as after a power failure before the sync, counts as not there and
    may be overwritten.
    """
    if not os.path.lexists(path):
        return False
    content = read_plain(path) if path.is_file() and path.stat().st_size <= len(value) else None
    if content is None or not value.startswith(content.rstrip(b"\0")):
        raise UserError(f"{path} exists and is not what key {key!r} holds: move it away, or give another --out")
    return content == value


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock `folder` while the block runs: a second export would write the same temporary files.

    Raises UserError if another export has locked it. Without effect on file systems without locks.
    """
    with Lock(folder.resolve()) as lock:  # --out may be a link
        with suppress(NoLocksError):
            if not lock.take():
                raise UserError(f"another export is writing to {folder}: wait, or give another --out")
        yield
