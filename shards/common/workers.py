"""Run jobs in worker processes: results in order, bounded memory, and no workers left after an error or kill."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from shards.common.environment import in_safe_directory
from shards.common.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

Tick = Callable[[int], None]
"""Callback with the number of images just done; that of a task raises StoppedError if the task should stop."""

_SECONDS_BETWEEN_LOOKS = 0.2
_SHARED_MEMORY = "/dev/shm"
_TOO_MANY = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of a limit on processes, open files or memory."""


class StoppedError(Exception):
    """Raised in a worker whose result is no longer needed."""


def available_cores() -> int:
    """Return the number of cores that this process may use, which a cluster may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    task: Callable[[Job, Tick], Result], jobs: Iterable[Job], workers: int, advance: Tick
) -> Generator[Result, None, None]:
    """Yield `task(job, tick)` for every job, in job order; at most 2 * `workers` jobs are drawn ahead.

    `advance` is called in this process with the images that the tasks have passed to their `tick`.

    `workers` 0 means all available cores; 1 runs in this process, for a debugger. `task` must pickle; each
    worker gets one copy of it. Close the generator (contextlib.closing) to stop the workers early. Raises
    any error of a task, and UserError if a worker dies or memory is exhausted.
    """
    try:
        yield from _map_in_order(task, jobs, workers or available_cores(), advance)
    except MemoryError:
        raise UserError("not enough memory: try fewer --workers") from None


def _map_in_order(
    task: Callable[[Job, Tick], Result], jobs: Iterable[Job], workers: int, advance: Tick
) -> Iterator[Result]:
    if workers == 1:
        yield from (task(job, advance) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks and open files
    with _explained(), in_safe_directory() as directory:  # starts multiprocessing's tracker of what processes share
        done, stop = context.Value("q", 0), context.Event()
        pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(task, done, stop, directory))
    try:
        for future in _submit_in_order(pool, jobs, 2 * workers):
            _follow(future, done, advance)
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for lack of memory: try fewer --workers") from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _submit_in_order(pool: ProcessPoolExecutor, jobs: Iterable[Any], limit: int) -> Iterator[Future[Any]]:
    """Yield the future of every job in order, with at most `limit` submitted ahead."""
    pending: deque[Future[Any]] = deque()
    for job in jobs:
        with _interrupts_held(), _explained(), in_safe_directory():  # a new Python imports from where it starts
            pending.append(pool.submit(_run, job))
        if len(pending) >= limit:
            yield pending.popleft()
    yield from pending


@contextmanager
def _explained() -> Iterator[None]:
    """Turn an OSError of the block, which makes what processes share or starts one, into UserError with the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "use fewer --workers, or --workers 1"
        if error.errno not in _TOO_MANY:
            remedy = f"they share memory in {_SHARED_MEMORY}: make that writable and larger, or use --workers 1"
        raise UserError(f"worker processes cannot be started: {error.strerror or error}: {remedy}") from None


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT: processes started in the block inherit the mask, so that only the parent handles Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(future: Future[Any], done: Any, advance: Tick) -> None:
    """Wait for `future` and meanwhile forward the counts of all workers to `advance`."""
    unfinished = True
    while unfinished:
        unfinished = bool(wait([future], timeout=_SECONDS_BETWEEN_LOOKS).not_done)
        with done.get_lock():
            images, done.value = done.value, 0
        advance(images)


_task: Callable[[Any, Tick], Any]
_done: Any
_stop: Any


def _begin(task: Callable[[Any, Tick], Any], done: Any, stop: Any, directory: str) -> None:
    """Set up a worker process that exits when its parent dies."""
    os.chdir(directory)
    global _task, _done, _stop
    _task, _done, _stop = task, done, stop
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # The queues do not signal a killed parent: the workers themselves hold the other ends open.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(job: Any) -> Any:
    return _task(job, _tick)


def _tick(images: int) -> None:
    if _stop.is_set():
        raise StoppedError
    with _done.get_lock():
        _done.value += images
