"""Ending at a step boundary, on all ranks at the same one, when a signal asks for it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def steps_between_agreements(world_size: int) -> int:
    """Return how often ranks agree on stopping: at each step, up to 63 of them."""
    return 1 + world_size // 64


class StopRequest:
    """Turns signals into a flag that all ranks see at the same step.

    The handler only sets the flag. `agreed` reduces the flags of all ranks over the CPU backend and reads the result
    one step later, so that it waits neither for the peers nor for the GPU. Gloo passes it from rank to rank in a ring,
    which of many ranks takes longer than a step: they agree every few steps. Before the ranks have met there is nothing
    to save, and a signal just ends the process.
    """

    def __init__(self) -> None:
        self._requested = False
        self._calls = 0
        self._flag = torch.zeros(1)
        self._reduction: dist.Work | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._reduction is not None:
            self._reduction.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Return whether a rank had been asked to stop when they last agreed; call it once a step on all ranks."""
        self._calls += 1
        if self._calls % steps_between_agreements(dist.get_world_size()):
            return False
        stopping = False
        if self._reduction is not None:
            self._reduction.wait()
            stopping = bool(self._flag.item())
        self._flag = torch.tensor([float(self._requested)])
        self._reduction = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return stopping

    def request(self) -> None:
        """Ask for a stop, as a signal does."""
        self._requested = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request()
        if number == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(number, signal.default_int_handler)
