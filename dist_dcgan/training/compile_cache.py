"""The folder of torch.compile's cache, from which it loads code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from shards.common.errors import OneRankError
from shards.common.files import make_private

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
    try:
        make_private(folder)
    except OSError as error:
        raise OneRankError(
            f"torch.compile has no cache: {error}: remove it, or name a folder of your own with {_VARIABLE}"
        ) from None
    os.environ[_VARIABLE] = str(folder)
