"""The folder that the ranks of one torchrun share on a machine: key-value stores in files instead of listeners.

A port of a machine accepts every user of it, and often other machines; a file in a folder with mode 0700 does not.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_dcgan.distributed.launch import Launch
from shards.common.errors import UserError
from shards.common.locks import Lock

_ORPHANED_SECONDS = 60.0


class PrivateFolder:
    """Folder in which this user's ranks of one torchrun meet; each holds a lock on it, and the last one removes it."""

    def __init__(self, path: Path) -> None:
        """Make or join the folder; raises OSError."""
        path.mkdir(mode=0o700, exist_ok=True)
        self.path = path
        self._lock = Lock(path)
        self._lock.take(shared=True)

    def store(self, name: str, ranks: int) -> Any:
        """Return a store of torch.distributed in the file `name`, for `ranks` processes."""
        return dist.FileStore(str(self.path / name), ranks)  # type: ignore[attr-defined]

    def leave(self) -> None:
        """Unlock the folder, and remove it if no other rank holds it."""
        with self._lock as lock:
            if lock.take():
                shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def private_folder(launch: Launch) -> Iterator[PrivateFolder | None]:
    """Join the folder of this start of the ranks on this machine; None if torchrun did not start them.

    It is named by the file in which torchrun expects the errors of this rank: its folder belongs to one start by one
    torchrun. Raises UserError if another user made the folder of all such folders, in the system's temporary folder.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not launch.by_torchrun or error_file is None:
        yield None
        return
    name = hashlib.sha256(os.fsencode(Path(error_file).parent.parent)).hexdigest()[:32]
    try:
        ours = _folder_of_user()
        if launch.local_rank == 0:
            _remove_orphans(ours)
        folder = PrivateFolder(ours / name)
    except OSError as error:
        raise UserError(
            f"the ranks cannot meet in {tempfile.gettempdir()}: {error}: set TMPDIR to a folder of your own"
        ) from None
    try:
        yield folder
    finally:
        folder.leave()


def _folder_of_user() -> Path:
    path = Path(tempfile.gettempdir(), f"dist_dcgan-{os.getuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(f"{path} is not a folder of this user alone")
    return path


def _remove_orphans(ours: Path) -> None:
    """Remove folders whose ranks were killed."""
    for path in ours.iterdir():
        with suppress(OSError):  # just removed by another
            if time.time() - path.stat().st_mtime > _ORPHANED_SECONDS:  # one that was just made is about to be locked
                with Lock(path) as lock:
                    if lock.take():
                        shutil.rmtree(path)
