"""What must be there for a cluster or hosts on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest


def require(programs: Sequence[str], probe: Sequence[str]) -> None:
    """Skip the test unless this is root, the programs are installed, and namespaces can be made as `probe` does."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    allowed = subprocess.run(probe, capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"no namespaces here: {allowed.stderr.strip()}")
