"""Atomic and durable writes, reads of regular files only, hashes and free space.

What a file system cannot do, such as fsync of a folder, is left out; what fails is raised.

Folders may come from others, or be writable by them. So no name of a file leads elsewhere: a link at the name of a file
that is written is replaced, or refused if the file is changed in place. A folder may be a link of this user's or of
root's, such as `checkpoints` on another disk, but of nobody else's. No FIFO, socket or device is opened.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from shards.common.errors import UserError

MOST_BYTES = 1 << 28
"""Largest file that is read as a whole, unless a caller says otherwise."""

_UNSUPPORTED = frozenset({errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def is_unsupported(error: OSError) -> bool:
    """Return whether the file system does not have an operation, in contrast to one that failed (EIO, ENOSPC).

    It is meant for calls with valid arguments: for them EINVAL and EBADF say "not for such a file", as CIFS and NFS do.
    """
    return error.errno in _UNSUPPORTED


def publish(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically and durably."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that is renamed to `path` when the block ends, and deleted if the block raises.

    Until then its name is `path`, 16 random hex digits and `.tmp`, which remains only if the process is killed
    (`remove_leftovers`). It is always a new file; a link at `path` is replaced. If not `durable`, the file is not
    fsynced: a power failure may truncate it until the caller syncs the disk. Raises OSError, as `open_folder` does.
    """
    folder = open_folder(path.parent)
    temporary = f"{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(path.with_name(temporary), "xb", opener=partial(_open_in, folder)) as file:
            yield file
            file.flush()
            if durable:
                sync(file.fileno())
        os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        if durable:
            sync(folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    finally:
        os.close(folder)


def _open_in(folder: int, path: str, flags: int) -> int:
    """Open a new file in a folder that is open, whatever has its name by now."""
    return os.open(os.path.basename(path), flags | os.O_NOFOLLOW, 0o666, dir_fd=folder)


def final_name(name: str) -> str:
    """Return the name that a temporary file of `atomic_file` would have got; any other name unchanged.

    Older versions used no random digits.
    """
    return re.sub(r"(?<=.)(\.[0-9a-f]{16})?\.tmp\Z", "", name, flags=re.DOTALL)


def remove_leftovers(folder: Path, ours: Callable[[str], object], seconds: float = 0.0) -> None:
    """Remove temporary files of killed processes that are older than `seconds`, if `ours` is true of the final name.

    Call it while nobody else writes such files, as under a lock. What cannot be removed stays; raises OSError, as
    `open_folder` does, if the folder exists.
    """
    with suppress(FileNotFoundError), opened_folder(folder) as opened:
        for name in os.listdir(opened):
            if name != final_name(name) and ours(final_name(name)):
                with suppress(OSError):
                    if time.time() - os.lstat(opened / name).st_mtime >= seconds:
                        os.unlink(opened / name)


class ForeignLinkError(OSError):
    """A folder in which files would be written or removed is a link of another user."""


def open_folder(path: Path) -> int:
    """Return the descriptor of a folder in which files are written; raises OSError.

    If `path` is a link, raises ForeignLinkError unless it is this user's or root's: others must not choose what is
    written to.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NOFOLLOW)
    except OSError:
        link = os.lstat(path)
        if not stat.S_ISLNK(link.st_mode):
            raise
    _require_own(path, link)
    folder = os.open(path, flags)
    now = os.lstat(path)
    if (now.st_ino, now.st_ctime_ns) != (link.st_ino, link.st_ctime_ns):  # exchanged in between
        os.close(folder)
        raise ForeignLinkError(errno.ELOOP, "a link that changes", str(path))
    return folder


@contextmanager
def opened_folder(path: Path) -> Iterator[Path]:
    """Open a folder as `open_folder` does, and yield a path of it that stays, whatever `path` leads to by then."""
    folder = open_folder(path)
    try:
        yield Path(f"/dev/fd/{folder}")
    finally:
        os.close(folder)


def require_own_folder(path: Path) -> None:
    """Raise ForeignLinkError if `path` is a link of another user; it need not exist."""
    with suppress(FileNotFoundError, NotADirectoryError):
        _require_own(path, os.lstat(path))


def _require_own(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode) and status.st_uid not in (os.geteuid(), 0):
        raise ForeignLinkError(errno.ELOOP, "a link of another user: name what it leads to, or remove it", str(path))


def make_private(folder: Path) -> None:
    """Make a folder that only this user can enter, if it does not exist; raises OSError if others may have made it."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if not is_private(folder):
        raise PermissionError(f"{folder} is not a folder of this user alone")


def is_private(folder: Path) -> bool:
    """Return whether this is a folder, not a link to one, that belongs to this user and that nobody else can enter."""
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077


class NotPlainError(OSError):
    """The path is a FIFO, device, socket or folder, or a link that is not followed, not a regular file."""


def open_plain(path: bytes | Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; raises OSError, NotPlainError if it is something else.

    Opening a FIFO would block, and opening a device may have side effects.
    """
    _require_plain(os.stat(path), path)
    descriptor = _plain(path, os.O_RDONLY)
    return open(descriptor, "rb", buffering=0)


def name_of(file: BinaryIO) -> str:
    """Return a name of an open file, whatever its path is by now, for libraries that open files by themselves."""
    return f"/dev/fd/{file.fileno()}"


def read_plain(path: Path, most_bytes: int | None = MOST_BYTES) -> bytes:
    """Return the content of a regular file; raises OSError, also if it has more than `most_bytes`, if given."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            raise OSError(errno.EFBIG, f"larger than {most_bytes:,} bytes", str(path))
        return io.BufferedReader(file).read(size)  # type: ignore[type-var]  # a FileIO


def read_named(path: Path, most_bytes: int | None = MOST_BYTES) -> bytes:
    """Return the content of a file that the user names: a regular one, or what the shell gives him to name.

    That is `<(COMMAND)` or /dev/stdin, from which no other FIFO can be told.
    """
    given = path == Path("/dev/stdin") or path.parent in (Path("/dev/fd"), Path("/proc/self/fd"))
    return path.read_bytes() if given else read_plain(path, most_bytes)


def open_in_place(path: Path) -> BinaryIO:
    """Open a regular file to read and change it, made if it does not exist; raises OSError, also for a link."""
    with suppress(FileNotFoundError):
        _require_plain(os.lstat(path), path)
    return open(_plain(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW), "r+b")


def _plain(path: bytes | Path, flags: int) -> int:
    """Open a file, and look at what was opened: the name may be that of something else by now."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    try:
        _require_plain(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_plain(status: os.stat_result, path: bytes | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a link, which is not followed" if stat.S_ISLNK(status.st_mode) else "not a plain file"
        raise NotPlainError(errno.EINVAL, what, os.fsdecode(path))


def leads_to_own(path: bytes | Path, target: os.stat_result) -> bool:
    """Return whether `path`, of which `target` is the status, is no link, or one that reveals nothing by being read.

    That is a link of this user's or of root's, or one of the owner of what it leads to: else somebody could have this
    user read, and pass on, files that he cannot read himself.
    """
    link = os.lstat(path)
    return not stat.S_ISLNK(link.st_mode) or link.st_uid in (os.geteuid(), 0, target.st_uid)


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, unless its file system cannot; raises OSError if that fails."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_unsupported(error):
            raise


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` durable, as `sync` does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def link_or_rename(part: Path, path: Path) -> None:
    """Give the file `part` the name `path`; raises FileExistsError if that is taken, and `part` then stays.

    On a file system without hard links, a file at `path` is replaced.
    """
    try:
        os.link(part, path)
    except OSError as error:
        if not (is_unsupported(error) or error.errno in (errno.EPERM, errno.EXDEV)):  # what FAT and AFS answer
            raise
        part.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hex; raises OSError."""
    with open_plain(path) as file:
        return content_sha256(file)


def content_sha256(file: BinaryIO) -> str:
    """Return the SHA-256, in hex, of an open file from its current position on."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def state_of(path: Path) -> tuple[str, int, int]:
    """Return a file's resolved path in hex, size in bytes and mtime in ns; raises UserError if it cannot be read."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return os.fsencode(path.resolve()).hex(), status.st_size, status.st_mtime_ns


def check_room(directory: Path, required_bytes: int, purpose: str, remedy: str = ": make room") -> None:
    """Raise UserError if the disk of `directory`, which may not exist yet, is too full; `purpose` says what for.

    A disk that does not tell its space passes.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    space = disk_space(existing)
    if space is not None and space.free < required_bytes:
        raise UserError(f"no room at {directory}: {purpose} {required_bytes:,} bytes, {space.free:,} are free{remedy}")


class DiskSpace(NamedTuple):
    """Size of a disk, and what is free on it, in bytes."""

    total: int
    free: int


def disk_space(path: Path) -> DiskSpace | None:
    """Return the space of the disk of `path`, None if its file system does not tell: some report a total of 0."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        if is_unsupported(error):
            return None
        raise
    return DiskSpace(usage.total, usage.free) if usage.total else None
