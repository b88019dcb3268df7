"""A signal to any rank ends all ranks at the same step, and the clock of rank 0 has all of them save at the same.

Promise 8 (stopping) of dist_dcgan/README.md.
"""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from dist_dcgan.distributed.world import process_group
from dist_dcgan.training.stopping import StepAgreement
from tests.benchmarks.collectives import Recorder, one_of, recorded
from tests.support.ranks import run_ranks


def steps_until_stopped(asked_rank: int) -> list[int]:
    """Take up to 20 uneven steps; the asked rank gets a signal in its sixth. Return the steps taken."""
    with process_group(60, "cpu") as world, StepAgreement() as stop:
        steps = []
        for step in range(20):
            time.sleep(0.01 * world.rank)
            if step == 5 and world.rank == asked_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            dist.all_reduce(torch.ones(3))
            steps.append(step)
            if stop.agreed().stop:
                break
        return steps


def steps_that_save(seconds_per_step: tuple[float, float]) -> tuple[list[int], int]:
    """Take 12 steps, a save due every 10 s by a clock that is set by hand, a different one on each rank.

    Return the steps after which a rank saved, and the reductions that it took part in beside those of its steps.
    """
    with process_group(60, "cpu") as world:
        now = [0.0]
        with StepAgreement(10.0, lambda: now[0]) as agreement:
            steps, reductions = [], 0
            for step in range(12):
                now[0] += seconds_per_step[world.rank]
                with Recorder() as recorder:
                    agreed = agreement.agreed()
                reductions += len(recorder.collectives)
                assert not agreed.stop
                if agreed.save:
                    steps.append(step)
            return steps, reductions


def test_all_ranks_save_by_the_clock_of_rank_0_whatever_theirs_say() -> None:
    """Due after 12, 24 and 36 s, in steps 2, 5 and 8, and agreed on a step later; with no collective of its own."""
    for clocks, steps in (
        ((4.0, 0.0), [3, 6, 9]),
        ((4.0, 3.0), [3, 6, 9]),
        ((4.0, 1000.0), [3, 6, 9]),
        ((0.0, 4.0), []),
    ):
        assert run_ranks(2, steps_that_save, clocks) == [(steps, 12)] * 2


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_none_stops_none() -> None:
    for asked_rank, steps in ((0, 7), (1, 7), (-1, 20)):
        assert run_ranks(2, steps_until_stopped, asked_rank) == [list(range(steps))] * 2


def test_many_ranks_agree_every_few_steps() -> None:
    with one_of(512), StepAgreement() as stop:
        reductions = [len(recorded(stop.agreed)) for _ in range(18)]
        assert reductions == [0] * 8 + [1] + [0] * 8 + [1]
        stop.request_stop()
        assert [stop.agreed().stop for _ in range(18)] == [False] * 17 + [True]


def test_many_ranks_that_agree_every_few_steps_save_once_when_it_is_due() -> None:
    now = [0.0]
    with one_of(512), StepAgreement(10.0, lambda: now[0]) as agreement:
        now[0] = 10.0
        assert [agreement.agreed().save for _ in range(36)] == [False] * 17 + [True] + [False] * 18
