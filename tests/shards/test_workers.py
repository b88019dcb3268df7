"""Jobs over processes: the order of results, and how errors and deaths come back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from shards.common.errors import UserError
from shards.common.workers import Tick, available_cores, map_in_order


class Counted:
    def __init__(self) -> None:
        self.images = 0

    def advance(self, images: int) -> None:
        self.images += images


def square(job: int, tick: Tick) -> int:
    if job == 99:
        raise UserError("99 is no number")
    if job == 77:
        os._exit(1)
    if job == 55:
        raise MemoryError
    tick(job)
    return job * job


def short_then_long(job: int, tick: Tick) -> int:
    """Job 0 ends at once, the others after 20 seconds."""
    for _ in range(1000 if job else 0):
        time.sleep(0.02)
        tick(1)
    return job


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs_and_all_ticks_count(workers: int) -> None:
    counted = Counted()
    assert list(map_in_order(square, range(20), workers, counted.advance)) == [job * job for job in range(20)]
    assert counted.images == sum(range(20))


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_drawn_as_they_are_needed(workers: int) -> None:
    drawn = []

    def jobs() -> Iterator[int]:
        for job in range(50):
            drawn.append(job)
            yield job

    with closing(map_in_order(square, jobs(), workers, Counted().advance)) as results:
        assert next(results) == 0
        assert len(drawn) <= 4


def test_closing_early_stops_running_jobs() -> None:
    results = map_in_order(short_then_long, range(10), 2, Counted().advance)
    assert next(results) == 0
    begin = time.monotonic()
    results.close()
    assert time.monotonic() - begin < 10  # of the 20 seconds that a job takes


def holds_interrupts(job: int, tick: Tick) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_only_the_parent_answers_to_ctrl_c() -> None:
    assert list(map_in_order(holds_interrupts, [1, 2, 3], 2, Counted().advance)) == [True] * 3
    assert not holds_interrupts(0, lambda _: None)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_error_of_a_task_is_raised_as_it_is(workers: int) -> None:
    with pytest.raises(UserError, match=r"^99 is no number$"):
        list(map_in_order(square, [1, 99, *range(20)], workers, Counted().advance))


def test_a_dead_worker_is_an_error_with_a_remedy() -> None:
    with pytest.raises(UserError, match=r"a worker process died, .* try fewer --workers"):
        list(map_in_order(square, [1, 77, 2], 2, Counted().advance))


@pytest.mark.parametrize("workers", [1, 2])
def test_lack_of_memory_is_an_error_with_a_remedy(workers: int) -> None:
    with pytest.raises(UserError, match=r"^not enough memory: try fewer --workers$"):
        list(map_in_order(square, [1, 55, 2], workers, Counted().advance))


def test_at_least_one_core_is_available() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
