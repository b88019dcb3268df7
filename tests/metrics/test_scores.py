"""Scores on several ranks: they wait for rank 0 with patience, and agree on which one is left out."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.metrics.quality import quality
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training import quality as module
from dist_dcgan.training.quality import QualityMeter
from dist_dcgan.training.train_state import TrainState
from tests.metrics.test_ranks import mosaic_extractor
from tests.support.ranks import run_ranks

TIMEOUT, LATE = 3.0, 8.0
SCORES = {"kid_mosaic": 0.5}


def meter_of(data: Path, folder: Path, world: World, clock: Any, **options: object) -> tuple[QualityMeter, TrainState]:
    """Return a meter that scores every step of 8 images with an extractor that needs no weights."""
    folder.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    usual = {"extractor": "none", "every_images": 8, "fakes": 16, "reals": 16}
    config = Config(width=8, global_batch=8, max_steps=40, quality=usual | options)
    reader = ShardReader(Folder(data))
    state = TrainState(config, make_plan(config, world.world_size, reader.manifest.samples), world, 64)
    meter = QualityMeter(state, reader, RunDirectory(folder), clock)
    meter.extractor = mosaic_extractor()
    return meter, state


def scores_of_a_slow_judge(data: Path, folder: Path, seconds: float) -> dict[str, float]:
    def late(*arguments: Any) -> dict[str, float]:
        time.sleep(seconds)
        return quality(*arguments)

    with process_group(TIMEOUT, "cpu") as world, mock.patch.object(module, "quality", late):
        meter, state = meter_of(data, folder, world, time.monotonic)
        state.step = 1
        return meter.read()


def test_two_ranks_score_as_one_and_may_compare_for_longer_than_a_collective_may_take(
    demo_shards: Path, tmp_path: Path
) -> None:
    (alone,) = run_ranks(1, scores_of_a_slow_judge, demo_shards, tmp_path / "1", 0)
    assert {"quality/kid_mosaic", "quality/fd_mosaic", "quality/fakes"} < alone.keys()
    ranks = run_ranks(2, scores_of_a_slow_judge, demo_shards, tmp_path / "2", LATE)
    assert ranks == [pytest.approx(alone, rel=1e-4)] * 2


def scored_steps(data: Path, folder: Path, seconds_per_step: tuple[float, float], share: float | None) -> list[int]:
    """Return the steps of 40 that were scored, by clocks that are set by hand: a score costs 2 s, from step 8 on 4."""
    now = [0.0]

    def judge(*_: object) -> dict[str, float]:
        now[0] += 2.0 if state.step < 8 else 4.0
        return SCORES

    with process_group(60, "cpu") as world, mock.patch.object(module, "quality", judge):
        meter, state = meter_of(data, folder, world, lambda: now[0], time_share=share)
        scored = []
        for step in range(1, 41):
            now[0] += seconds_per_step[world.rank]
            state.step = step
            if meter.read():
                scored.append(step)
        return scored


@pytest.mark.parametrize("other", [pytest.param(0.0, marks=pytest.mark.slow), 1000.0])
def test_ranks_leave_out_the_same_scores_whatever_their_clocks_say(
    other: float, demo_shards: Path, tmp_path: Path
) -> None:
    """2 s of 8, then 4 of 16: at 1 s a step, a score every 6 steps, then every 12."""
    found = run_ranks(2, scored_steps, demo_shards, tmp_path, (1.0, other), 0.25)
    assert found == [[1, 7, 13, 25, 37]] * 2


@pytest.mark.slow
def test_on_a_cpu_no_score_is_left_out_by_default(demo_shards: Path, tmp_path: Path) -> None:
    assert run_ranks(1, scored_steps, demo_shards, tmp_path, (0.001, 0.0), None) == [list(range(1, 41))]
