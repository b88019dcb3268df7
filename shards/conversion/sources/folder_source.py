"""Images from a folder of files: flat, one folder per class, or in the layout of LSUN's export."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.common.errors import UserError
from shards.common.files import NotPlainError, leads_to_own, open_plain
from shards.conversion.images import ImageError
from shards.conversion.sources.entries import MAX_ENTRY_BYTES, LeftOut, as_text

EXTENSIONS = frozenset({b".jpg", b".jpeg", b".png", b".webp", b".ppm"})
"""Extensions of image files. The format is detected by content: LSUN exports its JPEGs as `.webp`."""

_LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class FolderSource:
    """The image files below a folder, in the order of their names, folder by folder.

    The key of a file is its path below the folder without the extension, and without the folders of LSUN's
    export (one character each, together the beginning of the name). Links are followed, except another user's to what
    is not his; hidden files and folders, whose names begin with a dot, are left out.
    """

    key_rule = "a key is the path without the extension: rename one of them"
    archive_rule = "convert the folder that holds it"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.others: tuple[Path, ...] = ()
        """Folders that are sources, too: no link may lead to them."""
        self.left_out = LeftOut()
        """Hidden files and folders and files without an image extension in the last walk."""

    def describe(self) -> dict[str, Any]:
        """Return the source's `kind` and `name` for the manifest."""
        return {"kind": "folder", "name": as_text(os.fsencode(self.path.resolve().name))}

    def state(self) -> Any:
        """Return the resolved path in hex; changes of the files are not detected."""
        return os.fsencode(self.path.resolve()).hex()

    def entries(self) -> None:
        """Return None: counting would need a list of all files."""

    def walk(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, path below the folder) of every image file.

        Raises UserError for an unreadable folder, a link to a folder above it or to one that is read under another
        name, and a broken link without an image extension.
        """
        self.left_out = LeftOut()
        above, names = [self._open(b"")], FolderNames()
        for path in (self.path, *self.others):
            names.add(os.fsencode(path))
        while above:
            name = next(above[-1].names, None)
            if name is None:
                above.pop()
                continue
            place = os.path.join(above[-1].place, name)
            if name not in above[-1].folders:
                yield key_of(place), place
                continue
            folder = self._open(place)
            if any(folder.identity == other.identity for other in above):
                raise UserError(f"{self._shown(place)} is a link to a folder above it: remove it")
            if above[-1].folders[name] and (other := names.add(self._at(place))):
                raise UserError(f"{self._shown(place)} leads to the images of {other} a second time: remove the link")
            above.append(folder)

    def holds(self, key: bytes) -> None:
        """Return None: only a walk finds a key."""

    def name(self, key: bytes, place: bytes) -> bytes:
        """Return the path below the folder."""
        return place

    def read(self, key: bytes, place: bytes) -> bytes:
        """Return the content of the file at `place`; raises ImageError if it is not a regular file or too large."""
        path = self._at(place)
        try:
            with open_plain(path) as file:
                status = os.fstat(file.fileno())
                if not leads_to_own(path, status):
                    raise ImageError("another user's link to a file that is not his")
                size = status.st_size
                if size > MAX_ENTRY_BYTES:
                    raise ImageError(f"too large: {size:,} bytes")
                return os.pread(file.fileno(), size, 0)
        except NotPlainError:
            raise ImageError("not a plain file") from None
        except OSError as error:
            if error.errno in _LEADS_NOWHERE and os.path.islink(path):
                raise ImageError("a link to nothing") from None
            raise UserError(f"cannot read {self._shown(place)}: {error.strerror}; --exclude leaves it out") from None

    def _at(self, place: bytes) -> bytes:
        return os.path.join(os.fsencode(self.path), place)

    def _shown(self, place: bytes) -> str:
        return os.fsdecode(self._at(place))

    def _open(self, place: bytes) -> _Folder:
        images, folders = list[bytes](), dict[bytes, bool]()
        try:
            status = os.stat(self._at(place))
            if place and not leads_to_own(self._at(place), status):
                raise UserError(f"{self._shown(place)} is another user's link to a folder that is not his: remove it")
            with os.scandir(self._at(place)) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        self.left_out.add(os.path.join(place, entry.name))
                    elif _is_folder(entry):
                        folders[entry.name] = entry.is_symlink()
                    elif is_image_name(entry.name):
                        images.append(entry.name)
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        raise UserError(f"{os.fsdecode(entry.path)} is a link to nothing: mend or remove it")
                    else:
                        self.left_out.add(os.path.join(place, entry.name))
        except OSError as error:
            path = os.fsdecode(error.filename or self._at(place))
            raise UserError(f"cannot read the folder {path}: {error.strerror}") from None
        return _Folder(place, (status.st_dev, status.st_ino), folders, iter(sorted([*images, *folders])))


class _Folder(NamedTuple):
    """A folder on the current path of the walk."""

    place: bytes
    identity: tuple[int, int]
    folders: dict[bytes, bool]
    """Names of its folders, and whether each is a link."""
    names: Iterator[bytes]
    """Names not yet visited."""


class FolderNames:
    """Folders that are read with all folders below them, except hidden ones, to find those that have two names."""

    def __init__(self) -> None:
        self._folders, self._above = dict[bytes, bytes](), dict[bytes, bytes]()
        self._identities = dict[tuple[int, int], bytes]()

    def add(self, path: bytes) -> str:
        """Add a folder; return another name of it, or of a folder in it, that was added before; empty if there is none.

        Raises OSError if it cannot be read.
        """
        status, real = os.stat(path), os.path.realpath(path)
        above, identity = list(_readers(real)), (status.st_dev, status.st_ino)
        reader = next((folder for folder in above if folder in self._folders), None)
        other = self._above.get(real) or self._identities.get(identity)
        if reader is not None:
            other = self._folders[reader] + real[len(reader) :]
            other = self._folders[reader] if other == path else other  # a folder's own name would say nothing
        self._folders[real] = self._identities[identity] = path
        self._above |= dict.fromkeys(above, path)
        return os.fsdecode(other or b"")


def _readers(path: bytes) -> Iterator[bytes]:
    """Yield a folder and all folders above it that are read together with it: none above a hidden one."""
    yield path
    while not os.path.basename(path).startswith(b".") and path != os.path.dirname(path):
        path = os.path.dirname(path)
        yield path


def key_of(place: bytes) -> bytes:
    """Return the key of the file at a path below the folder."""
    *folders, name = os.path.splitext(place)[0].split(b"/")
    is_fan_out = all(len(folder) == 1 for folder in folders) and name.startswith(b"".join(folders))
    return name if is_fan_out else b"/".join([*folders, name])


def is_image_name(path: bytes) -> bool:
    """Return whether a path has an image extension and is not hidden."""
    name = path.rpartition(b"/")[2]
    return not name.startswith(b".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return False
        raise
