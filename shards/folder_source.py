"""Images from a folder of files: flat, one folder per class, or as LSUN's own export leaves them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.entries import MAX_ENTRY_BYTES
from shards.errors import UserError
from shards.images import ImageError

EXTENSIONS = frozenset({b".jpg", b".jpeg", b".png", b".webp", b".ppm"})
"""Names of images. What a file holds is told by its content: LSUN's JPEGs are exported as `.webp`."""


class FolderSource:
    """The image files below a folder, in the order of their names, folder by folder.

    The key of a file is its path below the folder without the extension; folders of one character each that
    spell the beginning of the name, as LSUN's export makes them, do not count. Links are followed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ignored = 0
        """Files without an image's extension, met by the walk."""

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of the source: its kind and name."""
        return {"kind": "folder", "name": self.path.resolve().name}

    def state(self) -> Any:
        """Return its place; whether a file in it changed is not looked at."""
        return os.fsencode(self.path.resolve()).hex()

    def entries(self) -> None:
        """Return nothing: counting would list all files first."""

    def walk(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, path below the folder) of every image file. Raises UserError for a folder that cannot be read."""
        self.ignored = 0
        yield from self._walk(b"", ())

    def read(self, key: bytes, place: bytes) -> bytes:
        """Return the content of the file at `place`; raises ImageError where it is too large."""
        path = os.path.join(os.fsencode(self.path), place)
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_ENTRY_BYTES + 1)
        except OSError as error:
            raise UserError(f"cannot read {os.fsdecode(path)}: {error.strerror}; --exclude leaves it out") from None
        if len(data) > MAX_ENTRY_BYTES:
            raise ImageError(f"too large: more than {MAX_ENTRY_BYTES:,} bytes")
        return data

    def _walk(self, below: bytes, ancestors: tuple[tuple[int, int], ...]) -> Iterator[tuple[bytes, bytes]]:
        directory = os.path.join(os.fsencode(self.path), below)
        try:
            status = os.stat(directory)
            with os.scandir(directory) as found:
                kinds = {entry.name: entry.is_dir() for entry in found}
        except OSError as error:
            raise UserError(f"cannot read the folder {os.fsdecode(directory)}: {error.strerror}") from None
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            raise UserError(f"{os.fsdecode(directory)} is a link to a folder above it: remove it")
        for name in sorted(kinds):
            place = os.path.join(below, name)
            if kinds[name]:
                yield from self._walk(place, (*ancestors, identity))
            elif not name.startswith(b".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield key_of(place), place
            else:
                self.ignored += 1


def key_of(place: bytes) -> bytes:
    """Return the key of the file at a path below the folder."""
    *folders, name = os.path.splitext(place)[0].split(b"/")
    is_fan_out = all(len(folder) == 1 for folder in folders) and name.startswith(b"".join(folders))
    return name if is_fan_out else b"/".join([*folders, name])
