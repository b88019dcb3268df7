"""The folder that a conversion fills: held by one at a time, and never at the cost of other files."""

from __future__ import annotations

import errno
import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shards.errors import UserError
from shards.files import check_room, sync_directory
from shards.manifest import MANIFEST_NAME
from shards.writer import KEYS_NAME, REJECTED_NAME

MARKER_NAME = "unfinished-conversion"
"""Stands in the folder from a conversion's start to its end, and marks what it left there as its own."""

_OURS = re.compile(rf"(shard-\d{{6,}}\.tar|{KEYS_NAME}|{REJECTED_NAME}|{MANIFEST_NAME}\.tmp)(\.tmp)?")

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a network file system answers that has no locks, as Lustre without its flock option."""


@contextmanager
def claim(out: Path, required_bytes: int) -> Iterator[None]:
    """Hold the folder `out` for a conversion while the block runs, without what an unfinished one left there.

    Where the block raises, its files stay under the marker, for the next conversion to replace. Raises
    UserError, before anything on the disk changes, where `out` holds a data set or files of others, where
    another conversion is writing there, or where its disk has no room for `required_bytes`.
    """
    leftovers = _leftovers(out)
    check_room(out, required_bytes - sum(path.stat().st_size for path in leftovers), "the shards take")
    out.mkdir(parents=True, exist_ok=True)
    marker = out / MARKER_NAME
    with marker.open("a") as lock:
        _lock(lock, out)
        for path in _leftovers(out):  # again: another may have ended before the lock was ours
            path.unlink()
        yield
        marker.unlink()
        sync_directory(out)


def _lock(file: IO[str], out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another conversion is writing to {out}: wait, or give another --out") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _leftovers(out: Path) -> list[Path]:
    """Return the files of an unfinished conversion in `out`; raises UserError where it holds others."""
    if not out.exists():
        return []
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder that is new or empty")
    paths = sorted(out.iterdir())
    if out / MANIFEST_NAME in paths:
        raise UserError(f"{out} already holds a data set: give another --out, or remove it first")
    unfinished = out / MARKER_NAME in paths
    leftovers = [path for path in paths if unfinished and _OURS.fullmatch(path.name)]
    foreign = [path.name for path in paths if path not in leftovers and path.name != MARKER_NAME]
    if foreign:
        raise UserError(f"--out {out} is not empty (it holds {foreign[0]}): give a folder that is new or empty")
    return leftovers
