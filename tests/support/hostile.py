"""What stands in a folder that somebody else made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NOBODY = 65534


def foreign_link(path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a link of another user: root can give it away, others can be taken for somebody else."""
    path.symlink_to(target)
    return foreign(path, monkeypatch)


def foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make what is at `path` another user's: root can give it away, others can be taken for somebody else."""
    if os.geteuid() == 0:
        os.lchown(path, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    return path


def secret(folder: Path) -> Path:
    """A file of this user's to which links of others lead."""
    path = folder / "secret"
    path.write_bytes(b"this user's own")
    return path
