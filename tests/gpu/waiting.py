"""Where the host waits for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.support.operations import OperationRecorder, Parts

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
"""Operations whose result the host waits for, on whatever device."""


@contextmanager
def synchronisations(device: torch.device) -> Iterator[Counter[str]]:
    """Count where the host waits for the device; on a CPU, operations that would make it wait on a GPU."""
    found: Counter[str] = Counter()
    if device.type == "cpu":
        with OperationRecorder(Parts("")) as recorder:
            yield found
        found.update(each.name for each in recorder.operations if each.name.split(".")[1] in _READS)
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with sync_mode(device, "warn"):
            yield found
    waits = [warning for warning in seen if "synchronizing" in str(warning.message)]
    found.update(f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in waits)


@contextmanager
def sync_mode(device: torch.device, mode: str) -> Iterator[None]:
    """Have CUDA warn or raise if the host waits for the device; does nothing on a CPU."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
