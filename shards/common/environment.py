"""Environment variables and the working directory, as all commands use them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from shards.common.errors import UserError

SAFE_DIRECTORY = "/"
"""Folder in which no other user can put a file. The working directory may be somebody's."""

_EMPTY_HAS_A_MEANING = frozenset(
    {
        # No device is to be seen; unset, all are.
        *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
        *("GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK", "ASCEND_RT_VISIBLE_DEVICES", "HABANA_VISIBLE_DEVICES"),
        "TZ",  # UTC; unset, the machine's time zone
        "PATH",  # the working directory; unset, the system's folders
        # No proxy; unset, that of ALL_PROXY or of a settings file.
        *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"),
        *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    }
)


def unset_empty_variables() -> None:
    """Remove empty variables from the environment, also for libraries and child processes.

    Job scripts and containers export variables for which they have no value, and programs disagree on what that means.
    """
    for name in [name for name, value in os.environ.items() if not value and name not in _EMPTY_HAS_A_MEANING]:
        del os.environ[name]


@contextmanager
def in_safe_directory() -> Iterator[str]:
    """Run the block in SAFE_DIRECTORY: what it starts or imports looks for code and settings in the working directory.

    Yield the working directory. For blocks during which no other thread opens a file by a relative path.
    """
    try:
        before = os.getcwd()
        os.chdir(before)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"the working directory cannot be entered: {reason}: start in a folder that you may enter"
        ) from None
    os.chdir(SAFE_DIRECTORY)
    try:
        yield before
    finally:
        os.chdir(before)
