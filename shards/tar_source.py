"""Images from other people's WebDataset shards, or any tars of images."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shards.entries import MAX_ENTRY_BYTES
from shards.errors import UserError
from shards.files import state_of
from shards.folder_source import EXTENSIONS
from shards.images import ImageError
from shards.manifest import TAR_BLOCK

_CHUNK = 1 << 20


class Place(NamedTuple):
    """Where a member's bytes lie."""

    tar: int
    offset: int
    size: int
    problem: str = ""
    """Why it is rejected unread."""


class TarSource:
    """The image members of some tars, in the order of the tars and of their members.

    Names are never used as paths. The key is the name up to the first dot of its last part, as webdataset
    splits it. Python's tarfile ends silently at a damaged header: here every tar is followed to its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
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

    def walk(self) -> Iterator[tuple[bytes, Place]]:
        """Yield (key, place) of every image member. Raises UserError for a tar that is damaged."""
        self.ignored = 0
        for index, path in enumerate(self.paths):
            with _damage_is_user_error(path):
                for member in _members(path):
                    name = os.fsencode(member.name)
                    if os.path.splitext(name)[1].lower() in EXTENSIONS:
                        yield key_of(name), Place(index, member.offset_data, member.size, _problem(member))
                    elif not member.isdir():
                        self.ignored += 1

    def read(self, key: bytes, place: Place) -> bytes:
        """Return the bytes of a member; raises ImageError where it is no plain file or too large."""
        if place.problem:
            raise ImageError(place.problem)
        path = self.paths[place.tar]
        with _damage_is_user_error(path), path.open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
        if len(data) < place.size:
            raise UserError(f"{path} changed while it was read: wait until nobody writes to it")
        return data


def key_of(name: bytes) -> bytes:
    """Return the key of a member: its path up to the first dot of the last part."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _problem(member: tarfile.TarInfo) -> str:
    if not member.isreg() or member.issparse():
        return "not a plain file in its tar"
    return f"too large: {member.size:,} bytes" if member.size > MAX_ENTRY_BYTES else ""


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar up to its end, which must be one."""
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is compressed, so that nothing in it can be found by place: gunzip it first")
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                yield member
            end = tar.offset
        file.seek(end)
        if len(file.read(TAR_BLOCK)) < TAR_BLOCK:
            raise UserError(f"{path} ends without the blocks that end a tar: an incomplete copy, copy it again")
        file.seek(end)
        while chunk := file.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise UserError(f"{path} is damaged: no header at byte {end}, but content behind it; copy it again")


@contextmanager
def _damage_is_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged, or no tar: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
