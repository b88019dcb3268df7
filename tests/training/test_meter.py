"""Speed and progress are those of training: the time of scores is left out."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_dcgan.config import Config, make_plan
from dist_dcgan.distributed.world import process_group
from dist_dcgan.loggers.console import ConsoleLogger
from dist_dcgan.training.meter import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows its first element."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_scores_are_no_part_of_the_time_of_a_step(clock: list[float]) -> None:
    plan = make_plan(Config(global_batch=4, max_steps=100), 1, 100)
    state: Any = SimpleNamespace(plan=plan, step=0)
    with process_group(60, "cpu"):
        meter = Meter(state, SimpleNamespace(waited=0.0, supplying=0.0))  # type: ignore[arg-type]
        for _ in range(2):
            meter.add({"loss/d": torch.tensor(1.0)})
            state.step += 1
            clock[0] += 0.5
        with meter.paused():
            clock[0] += 60
        last = meter.read()[-1]
    assert last["time/step"] == pytest.approx(0.5)
    assert last["throughput/images_per_second"] == pytest.approx(8)


def test_the_time_left_follows_from_the_steps_alone(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(Config(global_batch=4, max_steps=100), 1, 100)
    logger = ConsoleLogger(plan, 0)
    names = ("images_seen", "throughput/images_per_second", "loss/d", "loss/g", "score/real", "score/fake")
    row = dict.fromkeys((*names, "time/data_wait"), 0.0) | {"time/step": 2.0, "step": 10}
    clock[0] = 500.0  # of which 20 are steps
    logger.metrics(row)
    assert capsys.readouterr().err.rstrip().endswith("ETA 03:00")
