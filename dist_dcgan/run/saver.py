"""Asynchronous checkpoints: their schedule, and the thread that writes a copy of the tensors, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_dcgan.config import CheckpointOptions
from dist_dcgan.run.checkpoint import Retention, save_checkpoint

STEPS_ON_CPU = 1000
MINUTES_ON_GPU = 10.0


class Schedule(NamedTuple):
    """When checkpoints are due, apart from the one at the end and on a stop signal."""

    seconds: float | None
    """Interval by the clock of rank 0; None: not by time."""
    steps: tuple[int, ...]
    """At multiples of each of these."""

    def due_at(self, step: int) -> bool:
        """Return whether one is due after `step`, independent of the clock."""
        return any(step % every == 0 for every in self.steps)


def make_schedule(options: CheckpointOptions, device: torch.device) -> Schedule:
    """Return the configured schedule; with neither minutes nor steps, a default for the device.

    1,000 steps take seconds on a GPU and an hour on a CPU.
    """
    minutes, steps = options.every_minutes, options.every_steps
    if minutes is None and steps is None:
        if device.type == "cuda":
            minutes = MINUTES_ON_GPU
        else:
            steps = STEPS_ON_CPU
    multiples = tuple(every for every in (steps, options.keep_every_steps) if every is not None)
    return Schedule(None if minutes is None else 60 * minutes, multiples)


class Saver:
    """Writes the checkpoints of a run; a context manager that waits for the last one at its end."""

    def __init__(
        self,
        directory: Path,
        retention: Retention,
        device: torch.device,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        """`device` is the device of the tensors; `on_saved` is called with the step of each finished checkpoint."""
        self._directory, self._retention, self._device = directory, retention, device
        self._on_saved = on_saved
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_use, initargs=(device,))
        self._buffers: dict[str, Tensor] = {}
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy the tensors and start to write them; waits for the previous checkpoint first, as `wait` does.

        On a GPU the copies are queued on the current stream without waiting for them. The next step changes the tensors
        on the same stream, and so after the copies.
        """
        self.wait()
        for name, tensor in tensors.items():
            if name not in self._buffers:  # pinned memory, for asynchronous copies
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        copied = _recorded_event() if self._device.type == "cuda" else None
        self._writing = self._thread.submit(self._write, self._buffers, copied, values)

    def _write(self, copies: Mapping[str, Tensor], copied: torch.cuda.Event | None, values: Mapping[str, Any]) -> Path:
        if copied is not None:
            copied.synchronize()
        path = save_checkpoint(self._directory, copies, values, self._retention)
        self._on_saved(values["step"])
        return path

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; `wait` raises the error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written and the buffers are free; raises UserError if writing failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _use(device: torch.device) -> None:
    """Set this rank's GPU in the writing thread: a new thread uses GPU 0 and would allocate memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _recorded_event() -> torch.cuda.Event:
    """Return an event recorded after the work queued on the current stream; waiting for it takes no CPU time."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event
