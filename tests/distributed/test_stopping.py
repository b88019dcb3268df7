"""A signal to any rank ends all ranks at the same step."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from dist_dcgan.distributed import process_group
from dist_dcgan.training.stopping import StopRequest
from tests.benchmarks.collectives import one_of, recorded
from tests.ranks import run_ranks


def steps_until_stopped(asked_rank: int) -> list[int]:
    """Take up to 20 uneven steps; the asked rank gets a signal in its sixth. Return the steps taken."""
    with process_group(60, "cpu") as world, StopRequest() as stop:
        steps = []
        for step in range(20):
            time.sleep(0.01 * world.rank)
            if step == 5 and world.rank == asked_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            dist.all_reduce(torch.ones(3))
            steps.append(step)
            if stop.agreed():
                break
        return steps


def test_a_signal_to_one_rank_stops_all_at_the_same_step() -> None:
    for asked_rank in (0, 1):
        assert run_ranks(2, steps_until_stopped, asked_rank) == [list(range(7))] * 2


def test_no_signal_stops_none() -> None:
    assert run_ranks(2, steps_until_stopped, -1) == [list(range(20))] * 2


def test_many_ranks_agree_every_few_steps() -> None:
    with one_of(512), StopRequest() as stop:
        reductions = [len(recorded(stop.agreed)) for _ in range(18)]
        assert reductions == [0] * 8 + [1] + [0] * 8 + [1]
        stop.request()
        assert [stop.agreed() for _ in range(18)] == [False] * 17 + [True]
