"""Checkpoints written beside training: from a copy, on a thread of its own, never two at once."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dist_dcgan.training.checkpoint import Retention, save_checkpoint


class Saver:
    """Writes the checkpoints of a run; a context manager that ends when the last one is written."""

    def __init__(self, directory: Path, retention: Retention) -> None:
        self._directory, self._retention = directory, retention
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown()

    def save(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Copy what is to be written, and begin to write it; waits for the one before, as `wait` does."""
        self.wait()
        copies = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        self._writing = self._thread.submit(save_checkpoint, self._directory, copies, values, self._retention)

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written; `wait` raises why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Wait until all is written; raises UserError where it cannot be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
