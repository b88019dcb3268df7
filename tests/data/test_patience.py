"""Ranks that wait for data: with patience at the start, afterwards not longer than their peers wait for them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.data.storage.location import Folder, ShardFile
from dist_dcgan.distributed.collectives import barrier
from dist_dcgan.distributed.world import process_group
from shards.common.errors import OneRankError
from tests.support.ranks import run_ranks

TIMEOUT, LATE = 4.0, 8.0


class SlowFolder(Folder):
    """A folder that takes its time for one shard."""

    def __init__(self, directory: Path, slow: int) -> None:
        super().__init__(directory)
        self._slow = slow

    def ready(self, shard: int) -> ShardFile:
        if shard == self._slow:
            time.sleep(LATE)
        return super().ready(shard)


def steps_of(data: Path, slow_position: int, patient: bool) -> tuple[int, str]:
    """Steps that a rank took, each on a machine of its own, where the second one's disk is slow; and what ended it."""
    with process_group(TIMEOUT, "cpu") as world:
        config = Config(
            data={"path": data, "window_shards": 1},
            global_batch=8,
            max_steps=12,
            distributed={"timeout_seconds": TIMEOUT},
        )
        plan, order = make_plan(config, 2, 96), BatchLoader(Folder(data), config, make_plan(config, 1, 96), world, 0)
        slow = int(order.samples(slow_position)[0]) // 10 if world.rank == 1 else -1
        done = 0
        try:
            with BatchLoader(SlowFolder(data, slow), config, plan, world, 0) as batches:
                if patient:
                    batches.wait_for_first(lambda: None)
                    barrier(world)
                for _ in batches:
                    dist.all_reduce(torch.zeros(1))
                    done += 1
        except OneRankError as error:
            return done, str(error)
        except RuntimeError as error:
            return done, f"gloo: {error}"
        return done, ""


def test_the_first_batch_may_take_longer_than_a_collective(demo_shards: Path) -> None:
    assert run_ranks(2, steps_of, demo_shards, 0, True) == [(12, ""), (12, "")]


@pytest.mark.slow
def test_without_a_meeting_it_may_not(demo_shards: Path) -> None:
    (done, error), _ = run_ranks(2, steps_of, demo_shards, 0, False)
    assert done == 0 and error.startswith("gloo: ")


def test_later_the_rank_without_data_says_so_before_the_others_give_up(demo_shards: Path) -> None:
    started = time.monotonic()
    _, (done, error) = run_ranks(2, steps_of, demo_shards, 6, True)
    assert 0 < done < 12
    assert error.startswith("rank 1 of 2 on ") and "no data for 3.2 seconds, waiting for shard-0000" in error
    assert time.monotonic() - started < 100
