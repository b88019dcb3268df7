"""The output folder of a conversion: locks, free space, and no deletion of files from elsewhere."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shards.common.errors import UserError
from shards.common.files import check_room, final_name
from shards.common.locks import Lock, NoLocksError
from shards.conversion.reports import FOLDER_NAME, Part
from shards.manifest import MANIFEST_NAME
from shards.writer import KEYS_NAME, REJECTED_NAME

_OURS = re.compile(rf"shard-\d{{6,}}\.tar|{KEYS_NAME}|{REJECTED_NAME}|{MANIFEST_NAME}")
_LOCK_NAME = "lock"
_PARTS = re.compile(r"[1-9][0-9]{0,4}")

_TRIES, _SECONDS_TO_WAIT = 100, 5.0


@contextmanager
def claim(out: Path, part: Part, required_bytes: int = 0) -> Iterator[None]:
    """Lock the folder `out` for a part of a conversion while the block runs.

    Files written by the block are kept, for a later conversion to reuse or replace. Raises UserError, before
    anything on the disk changes, if `out` contains other files or its disk has no room for `required_bytes`; and
    if another conversion is writing this part or has another number of parts.
    """
    own = [path for path in _ours(out) if part.of == 1 or _is_shard_of(part, path)]
    check_room(out, required_bytes - sum(map(_size, own)), "the shards take")
    (out / FOLDER_NAME).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context(Lock(out / FOLDER_NAME / _LOCK_NAME))
        if part.of == 1:
            _lock(lock, out)
            lock.write("1")
        else:
            _lock_with_other_parts(lock, str(part.of), out)
            _lock(stack.enter_context(Lock(out / FOLDER_NAME / f"{part.name}.{_LOCK_NAME}")), out)
        for path in own:
            if path.name != final_name(path.name):  # of a killed conversion
                path.unlink(missing_ok=True)
        yield


@contextmanager
def claim_whole(out: Path) -> Iterator[int]:
    """Lock `out` for the merge of all parts; yields the number of parts.

    Raises UserError if `out` has no unfinished conversion or a part is still being written.
    """
    path = out / FOLDER_NAME / _LOCK_NAME
    _require_own_reports(out)
    if not path.is_file():
        raise UserError(f"nothing to merge at {out}: run convert --part I/N for all parts first")
    with Lock(path) as lock:
        _lock(lock, out)
        if not _PARTS.fullmatch(parts := lock.read()):
            raise UserError(f"{path} does not hold the number of parts: run convert --part I/N for all parts again")
        yield int(parts)


def clean_up(out: Path, shards: int) -> None:
    """Remove temporary files from `out`, and shards of older conversions after the first `shards`."""
    for path in _ours(out):
        number = _shard_number(path)
        if path.name != final_name(path.name) or (number is not None and number >= shards):
            path.unlink()


def finish(out: Path) -> None:
    """Remove the reports, but nothing elsewhere; the manifest replaces them."""
    shutil.rmtree(out / FOLDER_NAME, ignore_errors=True)


def _require_own_reports(out: Path) -> None:
    """Raise UserError if the folder of reports, which is written to and removed, is elsewhere."""
    if (out / FOLDER_NAME).is_symlink():
        raise UserError(f"{out / FOLDER_NAME} is a link, which no conversion leaves: remove it")


def _ours(out: Path) -> list[Path]:
    """Return the files of an unfinished conversion in `out`; raises UserError if it contains others."""
    _require_own_reports(out)
    if not out.exists():
        return []
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder that is new or empty")
    paths = sorted(path for path in out.iterdir() if path.name != FOLDER_NAME)
    unfinished = (out / FOLDER_NAME).is_dir()
    ours = [path for path in paths if unfinished and _OURS.fullmatch(final_name(path.name))]
    foreign = [path.name for path in paths if path not in ours]
    if foreign:
        raise UserError(f"--out {out} is not empty (it holds {foreign[0]}): give a folder that is new or empty")
    return ours


def _shard_number(path: Path) -> int | None:
    """Return the number of a shard, also of one that is being written; None if it is another file."""
    match = re.fullmatch(r"shard-(\d{6,})\.tar", final_name(path.name))
    return int(match[1]) if match else None


def _is_shard_of(part: Part, path: Path) -> bool:
    number = _shard_number(path)
    return number is not None and part.has(number)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:  # another part has just renamed it
        return 0


def _lock(lock: Lock, out: Path) -> None:
    if not _try_lock(lock):
        raise UserError(f"another conversion is writing to {out}: wait, or give another --out")


def _lock_with_other_parts(lock: Lock, count: str, out: Path) -> None:
    """Take the lock shared with the other parts; the first takes it exclusively to write the number of parts."""
    for _ in range(_TRIES):
        if _try_lock(lock, shared=True) and lock.read() == count:
            return
        if _try_lock(lock):
            lock.write(count)
        else:
            time.sleep(random.uniform(0, 2 * _SECONDS_TO_WAIT / _TRIES))
    raise UserError(f"another conversion is writing to {out}: wait, or give another --out")


def _try_lock(lock: Lock, shared: bool = False) -> bool:
    """Return False if another conversion holds the lock; True, too, if the file system has no locks."""
    try:
        return lock.take(shared=shared)
    except NoLocksError:
        return True
