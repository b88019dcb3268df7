"""Waits for what is going to be, and fails if that does not come."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.commands import SECONDS
from tests.support.forks import Forked


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[Any] | Forked | None = None, seconds: float = SECONDS
) -> None:
    """Return once `condition` holds; fails after `seconds`, and with the output of `process` if that ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.002)


def rows_so_far(run_dir: Path) -> int:
    """Return how many lines a run has written to metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0
