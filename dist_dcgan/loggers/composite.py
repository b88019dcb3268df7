"""Makes the loggers of rank 0: metrics.jsonl, sample grids, console, Weights & Biases.

No logger may stop training: if one fails, it is reported, and removed unless the error is one of the disk. The other
ranks get a plain `Logger`, which ignores all events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dist_dcgan.config import Plan
from dist_dcgan.distributed.world import World
from dist_dcgan.loggers.base import Logger, Row, reported
from dist_dcgan.loggers.console import ConsoleLogger
from dist_dcgan.loggers.jsonl import JsonlLogger
from dist_dcgan.loggers.pictures import SampleFiles, import_matplotlib
from dist_dcgan.loggers.wandb_logger import WandbLogger
from dist_dcgan.loggers.wandb_settings import WandbRun
from dist_dcgan.run.directory import RunDirectory
from shards.common.messages import warn


def make_logger(plan: Plan, world: World, run: RunDirectory, step: int, wandb_run: WandbRun) -> Logger:
    """Return the logger of this rank; it continues after `step`."""
    if not world.is_main:
        return Logger()
    with reported("curves"):
        import_matplotlib()
    loggers: list[Logger] = []
    with reported("metrics.jsonl"):
        loggers.append(JsonlLogger(run.metrics, step))
    loggers += [SampleFiles(run.samples), ConsoleLogger(plan, step)]
    if wandb_run.mode != "disabled":
        with reported("W&B"):
            loggers.append(WandbLogger(run, wandb_run))
    return CompositeLogger(loggers)


class CompositeLogger(Logger):
    """Passes events on to several loggers; if one fails, it is reported and removed.

    One whose disk fails stays, as a full disk is emptied and a server restarts; each such error is reported once.
    """

    def __init__(self, loggers: list[Logger]) -> None:
        self._loggers = loggers
        self._reported = set[tuple[Logger, int | None]]()

    def metrics(self, row: Row) -> None:
        """Pass on."""
        self._each("metrics", row)

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Pass on."""
        self._each("samples", step, draw)

    def alert(self, step: int, text: str) -> None:
        """Pass on."""
        self._each("alert", step, text)

    def close(self) -> None:
        """Pass on."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for logger in list(self._loggers):
            try:
                getattr(logger, method)(*arguments)
            except OSError as error:
                if (logger, error.errno) not in self._reported:
                    self._reported.add((logger, error.errno))
                    warn(f"{type(logger).__name__} failed and is tried again: {error!r}")
            except Exception as error:  # no error of a logger may stop training
                warn(f"{type(logger).__name__} failed and is turned off: {error!r}")
                self._loggers.remove(logger)
