"""Base class of loggers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from shards.common.messages import warn

Row = Mapping[str, float]


class Logger:
    """Receives the events of a run, and ignores those that a subclass does not override."""

    def metrics(self, row: Row) -> None:
        """Log the metrics of a step."""

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Log a grid: `draw` computes images (N, 3, size, size) in [-1, 1], which takes time."""

    def alert(self, step: int, text: str) -> None:
        """Log a message of some lines for the user."""

    def close(self) -> None:
        """Finish; takes seconds at most."""


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn an exception inside, which is not critical to training, into a warning."""
    try:
        yield
    except Exception as error:  # a full disk, a missing font, ...: training continues
        warn(f"{what}: {error!r}")
