"""Images from WebDataset shards or any other tars of images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shards.common.errors import UserError
from shards.common.files import leads_to_own, open_plain, state_of
from shards.conversion.images import ImageError
from shards.conversion.sources.entries import MAX_ENTRY_BYTES, LeftOut, as_text
from shards.conversion.sources.folder_source import is_image_name
from shards.conversion.sources.tar_members import DamagedError, Member, members

_TAR_NAME = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst|lz4|lz|Z)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
"""Includes compressed tars, so that they raise an error instead of being ignored."""


class MemberLocation(NamedTuple):
    """Location of a member: index of the tar, offset and size in bytes."""

    tar: int
    offset: int
    size: int
    problem: str = ""
    """Reason to reject it, or empty."""
    name: bytes = b""


class TarSource:
    """The image members of one or more tars, in the order of the tars and of their members.

    Names are never used as paths. The key is the name up to the first dot of its last part, as in webdataset.
    """

    key_rule = "a key is the name up to its first dot: rename one, or unpack the tar and convert the folder"
    archive_rule = "unpack it once, and convert the folder that holds its files"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = sorted(found for found in path.iterdir() if is_tar_name(found)) if path.is_dir() else [path]
        self.left_out = LeftOut()
        """Members without an image extension in the last walk."""

    def describe(self) -> dict[str, Any]:
        """Return the source's `kind` and `name` for the manifest."""
        return {"kind": "tar", "name": as_text(os.fsencode(self.path.resolve().name))}

    def state(self) -> Any:
        """Return path, size and mtime of every tar."""
        return [state_of(path) for path in self.paths]

    def entries(self) -> None:
        """Return None: counting would need a walk of all headers."""

    def walk(self) -> Iterator[tuple[bytes, MemberLocation]]:
        """Yield (key, place) of every image member; raises UserError for a damaged tar."""
        self.left_out = LeftOut()
        for index, path in enumerate(self.paths):
            with _damage_is_user_error(path), self._open(path) as file:
                for member in members(file.fileno()):
                    if member.is_folder:
                        continue
                    if is_image_name(member.name):
                        place = MemberLocation(index, member.offset, member.size, _problem(member), member.name)
                        yield key_of(member.name), place
                    else:
                        self.left_out.add(member.name)

    def holds(self, key: bytes) -> None:
        """Return None: only a walk finds a key."""

    def name(self, key: bytes, place: MemberLocation) -> bytes:
        """Return the member's name."""
        return place.name

    def read(self, key: bytes, place: MemberLocation) -> bytes:
        """Return the bytes of a member; raises ImageError if it is not a regular file or too large."""
        if place.problem:
            raise ImageError(place.problem)
        path = self.paths[place.tar]
        with _damage_is_user_error(path), self._open(path) as file:
            data = os.pread(file.fileno(), place.size, place.offset)
        if len(data) < place.size:
            raise UserError(f"{path} changed while it was read: wait until nobody writes to it")
        return data

    def _open(self, path: Path) -> BinaryIO:
        file = open_plain(path)
        if path != self.path and not leads_to_own(path, os.fstat(file.fileno())):
            file.close()
            raise UserError(f"{path} is another user's link to a file that is not his: remove it")
        return file


def is_tar_name(path: Path) -> bool:
    """Return whether a path is named like a tar, compressed or not."""
    return _TAR_NAME.fullmatch(path.name) is not None


def key_of(name: bytes) -> bytes:
    """Return the key of a member: its path up to the first dot of the last part."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _problem(member: Member) -> str:
    too_large = f"too large: {member.size:,} bytes" if member.size > MAX_ENTRY_BYTES else ""
    return member.problem or too_large


@contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{path} {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
