"""The folder of torch.compile's cache, from which it loads code."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from shards.common.errors import OneRankError

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use_own_cache() -> None:
    """Have torch.compile use a folder in which nobody else can write, unless TORCHINDUCTOR_CACHE_DIR names one.

    Torch's default, /tmp/torchinductor_USER, may have been made by somebody else. Raises OneRankError, with the
    remedy, if this one was.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # torch starts Pythons in the working directory, which may be somebody's
    if os.environ.get(_VARIABLE):
        return
    folder = Path(tempfile.gettempdir(), f"dist_dcgan-compile-{os.geteuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise OneRankError(
            f"torch.compile's cache {folder} can be written to by others: remove it, or name a folder of your own with "
            f"{_VARIABLE}"
        )
    os.environ[_VARIABLE] = str(folder)
