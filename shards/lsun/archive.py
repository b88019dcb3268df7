"""Unzip an untrusted archive that should contain one LMDB."""

from __future__ import annotations

import io
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from shards.common.files import check_room, sync, sync_directory
from shards.common.progress import Progress

_CHUNK_BYTES = 1 << 20
_MOST_DIRECTORY_BYTES = 1 << 20
_MOST_EXPANSION = 4
"""Photographs hardly shrink in an archive; an LMDB has some empty pages."""
_FREE_EXPANSION_BYTES = 1 << 28

_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError)
"""Exceptions of zipfile for damaged bytes."""


class ArchiveError(Exception):
    """An archive is damaged or contains unexpected members; the message says which."""


class _ArchiveFile(io.FileIO):
    """File that refuses large reads: zipfile reads the archive's list of members, of any length, at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MOST_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its list of members is too long")
        return super().read(_MOST_DIRECTORY_BYTES if size is None or size < 0 else size)


def unpack(archive: Path, name: str, folder: Path) -> None:
    """Unzip `name`/data.mdb, and `name`/lock.mdb if present, to the new folder `folder`, durably.

    Raises ArchiveError if the archive contains anything else or is damaged, UserError if the disk has no room,
    OSError if the disk fails; `folder` is then removed.
    """
    try:
        with _ArchiveFile(archive) as file, zipfile.ZipFile(file) as source:
            members = check_members(source.infolist(), name)
            total = sum(member.file_size for member in members)
            if total > _MOST_EXPANSION * archive.stat().st_size + _FREE_EXPANSION_BYTES:
                raise ArchiveError(f"it expands to {total:,} bytes, which no archive of photographs does")
            check_room(folder.parent, total, f"the images of {name}.zip take")
            folder.mkdir()
            with Progress(total, f"unzip {name}", unit="B") as progress:
                for member in members:
                    _extract(source, member, folder / Path(member.filename).name, progress)
        sync_directory(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, _DAMAGE):
            raise ArchiveError(f"it is damaged, or no zip file ({' '.join(str(error).split())[:200]})") from None
        raise


def check_members(members: Sequence[zipfile.ZipInfo], name: str) -> list[zipfile.ZipInfo]:
    """Return the files among `members`; raises ArchiveError unless they are exactly the LMDB `name`."""
    names: set[str] = set()
    for member in members:
        objection = "which it held before" if member.orig_filename in names else _objection(member, name)
        if objection:
            raise ArchiveError(f"it holds {member.orig_filename[:80]!r}, {objection}")
        names.add(member.orig_filename)
    if f"{name}/data.mdb" not in names:
        raise ArchiveError(f"it holds no {name}/data.mdb")
    return [member for member in members if not member.is_dir()]


def _objection(member: zipfile.ZipInfo, name: str) -> str:
    """Return why `member` must not be unpacked, or an empty string."""
    # orig_filename: the full name in the archive; zipfile cuts `filename` at a zero byte
    if member.orig_filename not in (f"{name}/", f"{name}/data.mdb", f"{name}/lock.mdb"):
        return f"which is no file of {name}"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFDIR if member.is_dir() else stat.S_IFREG):
        return "which is a link or a device"
    if member.header_offset < 0:
        return "which begins before the archive does"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "which is neither stored nor deflated"
    if member.flag_bits & 1:
        return "which is encrypted"
    return ""


def _extract(source: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, progress: Progress) -> None:
    """Write one member durably; zipfile stops at the declared size and checks the CRC at the end."""
    written = 0
    with source.open(member) as compressed, path.open("xb") as file:
        while chunk := compressed.read(_CHUNK_BYTES):
            file.write(chunk)
            written += len(chunk)
            progress.advance(len(chunk))
        file.flush()
        sync(file.fileno())
    if written != member.file_size:
        raise ArchiveError(f"{member.filename} has {written:,} bytes, not the {member.file_size:,} that it declares")
