"""Which files nobody but this user can have written or can still change."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple


class Ownership(NamedTuple):
    """Owner and permissions by which a file system shows the files of this process.

    Some file systems keep neither (CIFS, FAT, NFS that maps root to nobody). What users can do to each other's files
    is decided by the server or by the mount there, so only the owner that it shows is compared.
    """

    owner: int
    """User that new files of this process belong to."""
    forbidden: int
    """Permission bits that let others write; 0 if the file system does not keep them."""

    @classmethod
    def on_disk_of(cls, folder: Path) -> Ownership:
        """Find out with a nameless file, which nobody can exchange; raises OSError if `folder` cannot be written."""
        with tempfile.TemporaryFile(dir=folder) as file:
            status = os.fstat(file.fileno())
        keeps = status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077
        return cls(status.st_uid, stat.S_IWGRP | stat.S_IWOTH if keeps else 0)

    def belongs(self, status: os.stat_result) -> bool:
        """Return whether a file belongs to this user, even if others may write to it."""
        return stat.S_ISREG(status.st_mode) and status.st_uid == self.owner

    def protects(self, status: os.stat_result) -> bool:
        """Return whether a file is a regular one of this user that others cannot write to."""
        return self.belongs(status) and not status.st_mode & self.forbidden
