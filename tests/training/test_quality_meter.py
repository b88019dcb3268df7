"""Scores inside training never stop it. That they keep to their share of the time: `tests/metrics/test_scores.py`."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from dist_dcgan.distributed.world import process_group
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.training import quality as module
from tests.metrics.test_scores import meter_of


@pytest.mark.parametrize("fault", ["none", "comparison fails", "disk is full", "generator is not finite"])
def test_a_score_that_fails_is_reported_and_training_goes_on(
    fault: str,
    demo_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with process_group(60, "cpu") as world:
        meter, state = meter_of(demo_shards, tmp_path, world, time.monotonic)
        if fault == "comparison fails":
            monkeypatch.setattr(module, "quality", mock.Mock(side_effect=ArithmeticError("no convergence")))
        if fault == "disk is full":
            monkeypatch.setattr(
                module, "export_generator", mock.Mock(side_effect=OSError(28, "No space left on device"))
            )
        if fault == "generator is not finite":
            next(state.generator_ema.parameters()).data.fill_(torch.nan)
        state.step = 1
        scores = meter.read()
    warned = capsys.readouterr().err
    assert ("warning: " in warned) == (fault in ("comparison fails", "disk is full"))
    assert RunDirectory(tmp_path).best.is_file() == (state.best_kid is not None) == (fault == "none")
    assert (scores == {}) == (fault in ("comparison fails", "generator is not finite"))


@pytest.mark.parametrize(("extractor", "replaced"), [(f"mosaic {0:064}", False), (f"mosaic {1:064}", True)])
def test_the_best_so_far_is_the_best_by_one_extractor(
    extractor: str, replaced: bool, demo_shards: Path, tmp_path: Path
) -> None:
    with process_group(60, "cpu") as world:
        meter, state = meter_of(demo_shards, tmp_path, world, time.monotonic)
        before, state.best_kid, state.best_kid_extractor = -1.0, -1.0, extractor
        state.step = 1
        assert meter.read()
        assert (state.best_kid != before) == RunDirectory(tmp_path).best.is_file() == replaced
        assert state.best_kid_extractor == f"mosaic {0:064}"


def test_the_first_score_that_is_left_out_is_told(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with process_group(60, "cpu") as world:
        meter, state = meter_of(demo_shards, tmp_path, world, time.monotonic, time_share=1e-9)
        scored = []
        for state.step in (1, 2, 3):
            scored.append(meter.read() != {})
    assert scored == [True, False, False]
    assert capsys.readouterr().err.count("a score is left out, as scores may take 0% of the time: --quality") == 1
