"""Images from other people's WebDataset shards, or any tars of images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shards.common.errors import UserError
from shards.common.files import state_of
from shards.conversion.images import ImageError
from shards.conversion.sources.entries import MAX_ENTRY_BYTES
from shards.conversion.sources.folder_source import is_image_name
from shards.conversion.sources.plain_file import open_plain
from shards.conversion.sources.tar_members import DamagedError, Member, members

_TAR_NAME = re.compile(r"[^.].*\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
"""Compressed tars are among them: they are refused by name, not passed over."""


class MemberLocation(NamedTuple):
    """Where a member's bytes lie."""

    tar: int
    offset: int
    size: int
    problem: str = ""
    """Why it is rejected unread."""


class TarSource:
    """The image members of some tars, in the order of the tars and of their members.

    Names are never used as paths. The key is the name up to the first dot of its last part, as webdataset
    splits it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = sorted(found for found in path.iterdir() if is_tar_name(found)) if path.is_dir() else [path]
        self.ignored = 0
        """Members without an image's extension, met by the walk."""

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source: its kind and name."""
        return {"kind": "tar", "name": self.path.resolve().name}

    def state(self) -> Any:
        """Return the places, sizes and times of change of the tars."""
        return [state_of(path) for path in self.paths]

    def entries(self) -> None:
        """Return nothing: counting would walk all headers first."""

    def walk(self) -> Iterator[tuple[bytes, MemberLocation]]:
        """Yield (key, place) of every image member. Raises UserError for a tar that is damaged."""
        self.ignored = 0
        for index, path in enumerate(self.paths):
            with _damage_is_user_error(path), open_plain(path) as file:
                for member in members(file.fileno()):
                    if is_image_name(member.name):
                        yield key_of(member.name), MemberLocation(index, member.offset, member.size, _problem(member))
                    elif not member.is_folder:
                        self.ignored += 1

    def read(self, key: bytes, place: MemberLocation) -> bytes:
        """Return the bytes of a member; raises ImageError where it is no plain file or too large."""
        if place.problem:
            raise ImageError(place.problem)
        path = self.paths[place.tar]
        with _damage_is_user_error(path), open_plain(path) as file:
            data = os.pread(file.fileno(), place.size, place.offset)
        if len(data) < place.size:
            raise UserError(f"{path} changed while it was read: wait until nobody writes to it")
        return data


def is_tar_name(path: Path) -> bool:
    """Return whether a path has the name of a tar, compressed or not."""
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
