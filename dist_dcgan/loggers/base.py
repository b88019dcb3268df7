"""What every logger offers, and how a problem that must not stop training is reported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from torch import Tensor

Row = Mapping[str, float]


class Logger(Protocol):
    """Receives what happens in a run."""

    def metrics(self, row: Row) -> None:
        """Take the metrics of a step."""

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Take a grid: `draw` returns images (N, 3, size, size) in [-1, 1] and costs time."""

    def alert(self, step: int, text: str) -> None:
        """Take what a person should know at once, some lines."""

    def close(self) -> None:
        """Finish within seconds."""


class NullLogger:
    """The logger of every rank but 0."""

    def metrics(self, row: Row) -> None:
        """Do nothing."""

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Do nothing."""

    def alert(self, step: int, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


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
