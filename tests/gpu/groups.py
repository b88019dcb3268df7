"""Runs groups of items, each in a process of its own, under time limits; goes on after whatever happens to one.

The processes are forked from one that has imported torch and has not touched CUDA: Python and torch take ten seconds to
start on some machines. A process that hangs, crashes, or is left with a broken CUDA context is replaced by another that
goes on with the rest of its group.
"""

from __future__ import annotations

import gc
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from shards.common.errors import UserError
from tests.gpu.items import Context, Item, Outcome, Skipped, in_words

_FORK = get_context("fork")
_LEAST_SECONDS = 3.0
"""An item is not begun with less time than that."""
_SECONDS_TO_BEGIN = 30.0


class Started(NamedTuple):
    """A process says that it begins an item, and when it must be done."""

    item: Item
    deadline: float


class Budget(NamedTuple):
    """The time that a part has."""

    deadline: float
    """When it is over, by the monotonic clock, which all processes share."""
    scale: float
    """By which the limits of the items are multiplied."""


def run_items(items: Sequence[Item], context: Context, budget: Budget, at_once: int) -> Iterator[Outcome]:
    """Run the items, `at_once` groups at a time, and yield each outcome as it is known."""
    waiting = deque(list(group) for _, group in groupby(items, lambda item: item.group))
    running: list[_Group] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Group(waiting.popleft(), context, budget))
            wait(
                [group.pipe for group in running], max(0.0, min(group.deadline for group in running) - time.monotonic())
            )
            for group in list(running):
                yield from group.news()
                if group.ended:
                    running.remove(group)
                    if group.rest:
                        waiting.appendleft(group.rest)
    finally:
        for group in running:
            group.kill()


class _Group:
    """A process that runs items, as seen from outside."""

    def __init__(self, items: list[Item], context: Context, budget: Budget) -> None:
        self.rest, self.ended = items, False
        self._started, self._busy = time.monotonic(), False
        self.deadline = self._started + _SECONDS_TO_BEGIN
        self.pipe, theirs = _FORK.Pipe(duplex=False)
        self._process = _FORK.Process(target=_work, args=(theirs, items, context, budget))
        self._process.start()
        theirs.close()  # so that reading from a process that died raises EOFError

    def news(self) -> Iterator[Outcome]:
        """Yield what has become of items since the last call; ends the process if it is too late."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, Started):
                    self._started, self._busy, self.deadline = time.monotonic(), True, message.deadline
                else:
                    self.rest, self._busy = self.rest[1:], False
                    yield message
        except EOFError:
            self._process.join()
            self.kill()
            self.ended = True
            if self.rest and (self._busy or self._process.exitcode):
                yield self._lost(f"its process ended with status {self._process.exitcode}")
            return
        if time.monotonic() > self.deadline:
            self.kill()
            self.ended = True
            yield self._lost("not done within its time limit")

    def kill(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):  # it has ended, and so has all that it started
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()

    def _lost(self, reason: str) -> Outcome:
        item, self.rest = self.rest[0], self.rest[1:]
        return Outcome(item.name, "FAIL", time.monotonic() - self._started, reason)


def _work(pipe: Connection[Any, Any], items: Sequence[Item], context: Context, budget: Budget) -> None:
    """Run items one after the other, as the process of a group; ends early if CUDA cannot be used any more."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(context.folder / f"{items[0].group}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if context.rehearsing:
        torch.set_num_threads(1)
    with context.stack:
        for item in items:
            now = time.monotonic()
            context.seconds = min(item.seconds * budget.scale, budget.deadline - now)
            pipe.send(Started(item, now + max(context.seconds, _LEAST_SECONDS)))
            print(f"== {item.name}", flush=True)
            pipe.send(outcome_of(item, context))
            if not _usable(context):
                os._exit(0)  # leaving the process group would wait for the device


def outcome_of(item: Item, context: Context) -> Outcome:
    """Run an item."""
    started = time.monotonic()

    def outcome(status: Any, reason: str, **more: Any) -> Outcome:
        return Outcome(item.name, status, time.monotonic() - started, " ".join(reason.split())[:300], **more)

    if context.seconds < _LEAST_SECONDS:
        return outcome("SKIP", "no time is left")
    try:
        figures = item.run(context)
    except Skipped as skipped:
        return outcome("SKIP", str(skipped))
    except Exception as error:
        return outcome("FAIL", reason_of(error), details=traceback.format_exc())
    return outcome("PASS", in_words(figures), figures=figures)


def reason_of(error: BaseException) -> str:
    """Return what went wrong, and what went wrong first: ending a failed graph capture raises an error of its own."""
    known = isinstance(error, AssertionError | UserError) and str(error)
    reason = str(error) if known else f"{type(error).__name__}: {error}"
    if error.__context__ is None or error.__suppress_context__:
        return reason
    return f"{reason} (first: {reason_of(error.__context__)})"


def _usable(context: Context) -> bool:
    """Return whether CUDA, if it was used, still is in order; gives back what the item held."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        print("the CUDA context is lost: another process goes on", flush=True)
        return False
    return True
