"""Agreement of all ranks on the step at which they stop after a signal, or save by the clock."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from shards.common.messages import tell

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def steps_between_agreements(world_size: int) -> int:
    """Return the number of steps between agreements: 1 for up to 63 ranks."""
    return 1 + world_size // 64


class Agreed(NamedTuple):
    """Actions that the ranks have agreed on, after this step."""

    stop: bool
    """Stop training: a rank has received a signal."""
    save: bool
    """Write a checkpoint: one is due by the clock of rank 0."""


class StepAgreement:
    """Turns signals and the clock into flags that all ranks see at the same step.

    The signal handler only sets a flag. `agreed` reduces the flags of all ranks over the CPU backend and reads the
    result one step later, so that it waits neither for peers nor for the GPU. With many ranks, gloo's ring takes longer
    than a step, so they agree every few steps. Before the rendezvous there is nothing to save, and a signal ends the
    process; until the first batch is there, `end_if_signalled` does.
    """

    def __init__(self, save_seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """A save is due `save_seconds` after now and after each due save; None: never."""
        self._stop_requested = False
        self._signal: signal.Signals | None = None
        self._save_seconds, self._clock, self._since = save_seconds, clock, clock()
        self._calls = 0
        self._flags = torch.zeros(len(Agreed._fields))
        self._reduction: dist.Work | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StepAgreement:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._reduction is not None:
            self._reduction.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> Agreed:
        """Return the flags of all ranks, as last reduced; every rank calls it once per step."""
        self._calls += 1
        several = dist.is_initialized()
        if several and self._calls % steps_between_agreements(dist.get_world_size()):
            return Agreed(stop=False, save=False)
        if self._reduction is not None:
            self._reduction.wait()
        found = Agreed(*map(bool, self._flags.tolist()))
        mine = Agreed(self._stop_requested, self._save_is_due())
        self._flags = torch.tensor(mine, dtype=torch.float32)
        if several:
            self._reduction = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)
        return found

    def request_stop(self) -> None:
        """Request a stop, as a signal does."""
        self._stop_requested = True

    def end_if_signalled(self) -> None:
        """Raise SystemExit, with the status of a process that a signal ended, if one has come."""
        if self._signal is not None:
            tell(f"ended by {self._signal.name} before the first step: the same command starts it again")
            raise SystemExit(128 + self._signal)

    def _save_is_due(self) -> bool:
        """Return whether a save is due by rank 0's clock, and restart the clock if so; False on other ranks."""
        if self._save_seconds is None or (dist.is_initialized() and dist.get_rank() != 0):
            return False
        now = self._clock()
        if now - self._since < self._save_seconds:
            return False
        self._since = now
        return True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request_stop()
        self._signal = signal.Signals(number)
        if number == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(number, signal.default_int_handler)
