"""What a person is told beside progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


def warn(message: str) -> None:
    """Print one line of warning."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside, off the critical path, into a warning."""
    try:
        yield
    except Exception as error:  # a full disk, a missing font, ...: training has gone on or goes on
        warn(f"{what}: {error!r}")
