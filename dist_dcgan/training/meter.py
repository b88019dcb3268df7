"""How fast training goes, and how much of the time it waits for data."""

from __future__ import annotations

import time

from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.training.train_state import TrainState


class Meter:
    """Measures from one reading to the next."""

    def __init__(self, state: TrainState, batches: BatchLoader) -> None:
        self._batches = batches
        self._seconds, self._waited, self._step = time.perf_counter(), batches.waited, state.step

    def read(self, state: TrainState) -> dict[str, float]:
        """Return seconds a step, the share of time spent waiting for data, and images a second over all ranks."""
        seconds, waited, steps = time.perf_counter(), self._batches.waited, state.step - self._step
        elapsed, waiting = seconds - self._seconds, waited - self._waited
        self._seconds, self._waited, self._step = seconds, waited, state.step
        return {
            "time/step": elapsed / steps,
            "time/data_wait": waiting / elapsed,
            "throughput/images_per_second": steps * state.plan.global_batch / elapsed,
        }
