"""Checkpoints written beside training: when they are due, and the thread that writes a copy, never two at once."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_dcgan.config import CheckpointOptions
from dist_dcgan.run.checkpoint import Retention, save_checkpoint

STEPS_ON_CPU = 1000
MINUTES_ON_GPU = 10.0


class Schedule(NamedTuple):
    """When checkpoints are due, beside the one at the end and on a stop signal."""

    seconds: float | None
    """So often by the clock of rank 0; None if never."""
    steps: tuple[int, ...]
    """At multiples of each of these."""

    def due_at(self, step: int) -> bool:
        """Return whether one is due after `step`, whatever the clock says."""
        return any(step % every == 0 for every in self.steps)


def make_schedule(options: CheckpointOptions, device: torch.device) -> Schedule:
    """Return what the configuration asks for; if it names neither minutes nor steps, what suits the device.

    A GPU takes 1,000 steps in seconds, a CPU in an hour.
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
    """Writes the checkpoints of a run; a context manager that ends when the last one is written."""

    def __init__(self, directory: Path, retention: Retention, device: torch.device) -> None:
        """`device` is that of the tensors."""
        self._directory, self._retention, self._device = directory, retention, device
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_use, initargs=(device,))
        self._buffers: dict[str, Tensor] = {}
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown()

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy what is to be written, and begin to write it; waits for the one before, as `wait` does.

        On a GPU the copies are only queued on the current stream. They hold what the tensors are now, although nothing
        waits for them here: the next step changes the tensors on the same stream, and so after the copies.
        """
        self.wait()
        for name, tensor in tensors.items():
            if name not in self._buffers:  # page-locked, so that the GPU copies by itself
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        copies = {name: self._buffers[name] for name in tensors}
        copied = _recorded_event() if self._device.type == "cuda" else None
        self._writing = self._thread.submit(self._write, copies, copied, values)

    def _write(self, copies: Mapping[str, Tensor], copied: torch.cuda.Event | None, values: Mapping[str, Any]) -> Path:
        if copied is not None:
            copied.synchronize()
        return save_checkpoint(self._directory, copies, values, self._retention)

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written; `wait` raises why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until all is written, and the buffers are free; raises UserError where it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _use(device: torch.device) -> None:
    """Have the writing thread use the GPU of this rank: a thread begins on GPU 0, and would take memory there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _recorded_event() -> torch.cuda.Event:
    """Return an event that the current stream reaches after what is queued on it; waiting for it takes no CPU time."""
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event
