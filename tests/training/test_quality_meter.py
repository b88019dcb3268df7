"""Scores inside training never stop it, and keep to their share of the time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import process_group
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training import quality as module
from dist_dcgan.training.quality import QualityMeter, TimeShare
from dist_dcgan.training.train_state import TrainState
from shards.manifest import read_manifest
from tests.metrics.test_ranks import mosaic_extractor


@pytest.mark.parametrize("fault", ["none", "comparison fails", "disk is full", "generator is not finite"])
def test_a_score_that_fails_is_reported_and_training_goes_on(
    fault: str,
    demo_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"extractor": "none", "every_images": 8, "fakes": 16, "reals": 16}
    config = Config(width=8, global_batch=8, max_steps=4, quality=options)
    manifest = read_manifest(demo_shards)
    run = RunDirectory(tmp_path)
    with process_group(60, "cpu") as world:
        state = TrainState(config, make_plan(config, 1, manifest.samples), world, 64)
        meter = QualityMeter(state, ShardReader(Folder(demo_shards)), run)
        monkeypatch.setattr(meter, "_extractor", mosaic_extractor())
        if fault == "comparison fails":
            monkeypatch.setattr(module, "quality", fails(ArithmeticError("no convergence")))
        if fault == "disk is full":
            monkeypatch.setattr(module, "export_generator", fails(OSError(28, "No space left on device")))
        if fault == "generator is not finite":
            next(state.generator_ema.parameters()).data.fill_(torch.nan)
        state.step = 1
        scores = meter.read()
    warned = capsys.readouterr().err
    assert ("warning: " in warned) == (fault in ("comparison fails", "disk is full"))
    assert run.best.is_file() == (state.best_kid is not None) == (fault == "none")
    assert (scores == {}) == (fault in ("comparison fails", "generator is not finite"))


def test_scores_that_take_longer_leave_more_time_between_them() -> None:
    now = [0.0]
    share = TimeShare(0.25, lambda: now[0])

    def spend(seconds: float) -> None:
        with share.spending():
            now[0] += seconds

    allowed = []
    for step in range(1, 41):
        now[0] += 1.0
        if share.allows():
            allowed.append(step)
            spend(2.0 if step < 8 else 4.0)
    assert allowed == [1, 7, 13, 25, 37]  # 2 s of 8, then 4 s of 16


def test_a_share_of_the_whole_time_allows_every_score() -> None:
    now = [0.0]
    share = TimeShare(1.0, lambda: now[0])
    for _ in range(3):
        assert share.allows()
        with share.spending():
            now[0] += 100.0


def fails(error: Exception):  # type: ignore[no-untyped-def]
    def function(*_: object) -> None:
        raise error

    return function
