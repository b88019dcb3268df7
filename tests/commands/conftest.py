"""A finished run for the commands that look at one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_dcgan.trained import Trained, load_trained
from tests.support.commands import succeed, train_command
from tests.support.pictures import CPU


@pytest.fixture(scope="session")
def finished(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with three grids, not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--preset", "debug", "--width", 4, "--wandb", "disabled", "--max-steps", 6, "--data", demo_shards]
    flags += ["--log.samples-every-images", 32, "--quality.extractor", "none"]
    succeed(train_command(1, *flags, "--run-dir", run_dir))
    return run_dir


@pytest.fixture(scope="session")
def trained(finished: Path) -> Trained:
    return load_trained(finished, False, CPU)
