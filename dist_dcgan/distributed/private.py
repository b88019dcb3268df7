"""The folder that the ranks of one torchrun share on a machine: key-value stores in files instead of listeners.

A port of a machine accepts every user of it, and often other machines; a file in a folder with mode 0700 does not.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_dcgan.distributed.launch import Launch
from dist_dcgan.distributed.peers import machine
from shards.common.errors import UserError
from shards.common.files import is_private, make_private
from shards.common.locks import Lock

_ORPHANED_SECONDS = 60.0


class PrivateFolder:
    """Folder in which this user's ranks of one torchrun meet; each holds a lock on it, and the last one removes it."""

    def __init__(self, path: Path) -> None:
        """Make or join the folder; raises OSError, also if it is not one of this user alone."""
        make_private(path)
        self.path = path
        self._lock = Lock(path)
        self._lock.take(shared=True)

    def store(self, name: str, ranks: int) -> Any:
        """Return a store of torch.distributed in the file `name`, for `ranks` processes."""
        assert re.fullmatch(r"ranks|node-[0-9a-f]{16}", name), name
        store = dist.FileStore(str(self.path / name), ranks)  # type: ignore[attr-defined]
        # An extra reference, so that it is never destroyed: its destructor looks whether the file exists, then opens
        # it. If another rank removes the folder in between, it waits for the store's timeout and aborts (torch 2.14).
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
        return store

    def leave(self) -> None:
        """Unlock the folder, and remove it if no other rank holds it."""
        with self._lock as lock:
            if lock.take():
                shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def private_folder(launch: Launch) -> Iterator[PrivateFolder | None]:
    """Join the folder of this start of the ranks on this machine; None if torchrun did not start them.

    It is named by the file in which torchrun expects the errors of this rank: its folder belongs to one start by one
    torchrun. A secret of the launcher keeps others from making it first, if that file is where they can see it. Raises
    UserError if there can be none in the system's temporary folder.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not launch.by_torchrun or error_file is None:
        yield None
        return
    start = f"{os.environ.get('DIST_DCGAN_SECRET', '')} {Path(error_file).parent.parent}"
    name = hashlib.sha256(os.fsencode(start)).hexdigest()[:32]
    place = Path(tempfile.gettempdir())
    try:
        if launch.local_rank == 0:
            _remove_orphans(place)
        folder = PrivateFolder(place / f"{_prefix()}{name}")
    except OSError as error:
        raise UserError(
            f"the ranks cannot meet in {place}: {error}: set TMPDIR to a folder of your own on a local disk"
        ) from None
    try:
        yield folder
    finally:
        folder.leave()


def _prefix() -> str:
    return f"dist_dcgan-{os.geteuid()}-{machine()}-"  # machines may share the place, but not its locks


def _remove_orphans(place: Path) -> None:
    """Remove folders whose ranks were killed."""
    for path in place.glob(f"{_prefix()}*"):
        with suppress(OSError):  # just removed by another
            aged = time.time() - path.lstat().st_mtime > _ORPHANED_SECONDS  # one that was just made will be locked
            if aged and is_private(path):
                with Lock(path) as lock:
                    if lock.take():
                        shutil.rmtree(path)
