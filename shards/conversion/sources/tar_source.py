"""Images from WebDataset shards or any other tars of images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shards.common.errors import UserError
from shards.common.files import open_plain, state_of
from shards.conversion.images import ImageError
from shards.conversion.sources.entries import MAX_ENTRY_BYTES
from shards.conversion.sources.folder_source import is_image_name
from shards.conversion.sources.tar_members import DamagedError, Member, members

_TAR_NAME = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
"""Includes compressed tars, so that they raise an error instead of being ignored."""


class MemberLocation(NamedTuple):
    """Location of a member: index of the tar, offset and size in bytes."""

    tar: int
    offset: int
    size: int
    problem: str = ""
    """Reason to reject it, or empty."""


class TarSource:
    """The image members of one or more tars, in the order of the tars and of their members.

    Names are never used as paths. The key is the name up to the first dot of its last part, as in webdataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = sorted(found for found in path.iterdir() if is_tar_name(found)) if path.is_dir() else [path]
        self.ignored = 0
        """Number of members without an image extension in the last walk."""

    def describe(self) -> dict[str, Any]:
        """Return the source's `kind` and `name` for the manifest."""
        return {"kind": "tar", "name": self.path.resolve().name}

    def state(self) -> Any:
        """Return path, size and mtime of every tar."""
        return [state_of(path) for path in self.paths]

    def entries(self) -> None:
        """Return None: counting would need a walk of all headers."""

    def walk(self) -> Iterator[tuple[bytes, MemberLocation]]:
        """Yield (key, place) of every image member; raises UserError for a damaged tar."""
        self.ignored = 0
        for index, path in enumerate(self.paths):
            with _damage_is_user_error(path), open_plain(path) as file:
                for member in members(file.fileno()):
                    if is_image_name(member.name):
                        yield key_of(member.name), MemberLocation(index, member.offset, member.size, _problem(member))
                    elif not member.is_folder:
                        self.ignored += 1

    def read(self, key: bytes, place: MemberLocation) -> bytes:
        """Return the bytes of a member; raises ImageError if it is not a regular file or too large."""
        if place.problem:
            raise ImageError(place.problem)
        path = self.paths[place.tar]
        with _damage_is_user_error(path), open_plain(path) as file:
            data = os.pread(file.fileno(), place.size, place.offset)
        if len(data) < place.size:
            raise UserError(f"{path} changed while it was read: wait until nobody writes to it")
        return data


def is_tar_name(path: Path) -> bool:
    """Return whether a path is named like a tar, compressed or not."""
    return _TAR_NAME.fullmatch(path.name) is not None


def key_of(name: bytes) -> bytes:
    """Return the key of a member: its path up to the first dot of the last part."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _problem(member: Member) -> str:
    if not member.is_file:
        return "not a plain file in its tar"
    return f"too large: {member.size:,} bytes" if member.size > MAX_ENTRY_BYTES else ""


@contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{path} {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
