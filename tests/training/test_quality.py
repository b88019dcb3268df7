"""Scores and warnings while training runs, as people start it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import environment, metrics, run, succeed, train_command
from tests.support.commands import module as python

SCORED = ["--quality.every-images", 320, "--quality.fakes", 8, "--quality.reals", 12, "--wandb", "disabled"]
DEBUG = ["--preset", "debug", "--width", 4, *SCORED]
KID = "quality/kid_efficientnet_lite0"
GENERATOR_WINS = ["--optimizer.lr-d", 1e-9, "--optimizer.lr-g", 1e-2, "--quality.extractor", "none", "--max-steps", 60]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a cache of features of its own."""
    return environment() | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def scores(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(run_dir) if KID in row]


def test_the_loop_scores_and_keeps_the_best_generator(demo_shards: Path, tmp_path: Path, cache: dict[str, str]) -> None:
    flags = [*DEBUG, "--data", demo_shards, "--run-dir", tmp_path / "run", "--max-steps", 40, "--ema.ramp-up", 0.5]
    done = succeed(train_command(1, *flags), env=cache)
    rows = scores(tmp_path / "run")
    assert [row["step"] for row in rows] == [20, 40]
    assert all(row["quality/fakes"] == 8 and row["quality/reals"] == 12 for row in rows)
    assert "kid_efficientnet_lite0 " in done.stderr
    best = min(rows, key=lambda row: row[KID])
    description = json.loads((tmp_path / "run" / "generator_best.json").read_text())
    assert (description["step"], description["scores"][KID]) == (best["step"], best[KID])
    succeed(python("dist_dcgan.sample", tmp_path / "run", "--best", "--out", tmp_path / "best.png"))
    # A run that goes on knows how good the best was: nothing is better than a distance below any other.
    values_file = tmp_path / "run" / "generator_best.json"
    before = values_file.read_bytes()
    flags[flags.index("--max-steps") + 1] = 41
    succeed(train_command(1, *flags), env=cache)
    assert values_file.read_bytes() == before


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_collapse_stops_every_rank_where_that_is_asked(demo_shards: Path, tmp_path: Path, ranks: int) -> None:
    flags = [*DEBUG, *GENERATOR_WINS, "--data", demo_shards, "--run-dir", tmp_path / "run", "--on-collapse", "stop"]
    done = run(train_command(ranks, *flags))
    assert done.returncode == (2 if ranks == 1 else 1), done.stderr  # torchrun has a status of its own
    lines = done.stderr.splitlines()
    told = next(
        index for index, line in enumerate(lines) if line.startswith("warning: the generator has won, since step")
    )
    assert "what it is:" in lines[told + 1] and "what to try:" in lines[told + 2]
    assert sum(line.startswith("error: training is stopped at step") for line in lines) == 1
    assert metrics(tmp_path / "run")[-1]["alert"].startswith("the generator has won")


def test_a_collapse_only_warns_by_default(demo_shards: Path, tmp_path: Path) -> None:
    flags = [*DEBUG, *GENERATOR_WINS, "--data", demo_shards, "--run-dir", tmp_path / "run"]
    done = succeed(train_command(1, *flags))
    assert done.stderr.count("warning: the generator has won") == 1
    assert metrics(tmp_path / "run")[-1]["step"] == 60
    assert (tmp_path / "run" / "curves.png").is_file()
