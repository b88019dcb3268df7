"""What the steps since the last reading measured, how fast they went, and how much of the time they waited for data.

`time/data_wait` is the share of the time in which training waited for a batch, `time/shard_checks` the share in which
the thread that checks and stages shards was busy. Scores are not part of the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.distributed.collectives import average_across_ranks
from dist_dcgan.training.steps import Metrics
from dist_dcgan.training.train_state import TrainState


class Meter:
    """Collects the metrics of steps on the device and measures time, from one reading to the next."""

    def __init__(self, state: TrainState, batches: BatchLoader) -> None:
        self._state, self._batches = state, batches
        self._pending: list[Metrics] = []
        self._seconds, self._waited, self._supplying = time.perf_counter(), batches.waited, batches.supplying

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out: speed is that of training."""
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def add(self, metrics: Metrics) -> None:
        """Take the metrics of a step; nothing waits for the device."""
        self._pending.append(metrics)

    def read(self) -> list[dict[str, float]]:
        """Return a row per step since the last reading, averaged over ranks; the last row has the speed as well."""
        plan, steps = self._state.plan, len(self._pending)
        first = self._state.step - steps + 1
        rows = [
            {"step": step, "images_seen": step * plan.global_batch, "epoch": step / plan.steps_per_epoch} | row
            for step, row in enumerate(average_across_ranks(self._pending), first)
        ]
        seconds, waited, supplying = time.perf_counter(), self._batches.waited, self._batches.supplying
        elapsed, waiting, supplied = seconds - self._seconds, waited - self._waited, supplying - self._supplying
        self._pending, self._seconds, self._waited, self._supplying = [], seconds, waited, supplying
        rows[-1] |= {
            "time/step": elapsed / steps,
            "time/data_wait": waiting / elapsed,
            "time/shard_checks": supplied / elapsed,
            "throughput/images_per_second": steps * plan.global_batch / elapsed,
        }
        return rows
