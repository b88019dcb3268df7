"""The paper's own width, as people start it: to the letter it dies at once and says so, by default it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.commands import metrics, run, succeed, train_command

SMALL = ["--global-batch", 8, "--log.every-steps", 1, "--wandb", "disabled", "--on-collapse", "stop"]
SMALL += ["--ema.statistics-images", 32]


@pytest.mark.slow
def test_to_the_letter_it_collapses_and_is_named_within_twenty_steps(demo_shards: Path, tmp_path: Path) -> None:
    flags = ["--preset", "paper_literal", *SMALL, "--max-steps", 60, "--data", demo_shards, "--run-dir", tmp_path]
    done = run(train_command(1, *flags))
    assert done.returncode == 2, done.stderr
    assert "warning: the discriminator has won, since step" in done.stderr
    rows = metrics(tmp_path)
    dead = next(row["step"] for row in rows if row["grad_norm/g"] < 1e-2)
    assert rows[-1]["alert"].startswith("the discriminator has won")
    assert rows[-1]["step"] <= dead + 20
    assert rows[-2]["loss/g"] > 20  # Loss_D or Loss_G "goes to 0", and the other stands high


@pytest.mark.slow
def test_by_default_it_does_not(demo_shards: Path, tmp_path: Path) -> None:
    flags = [*SMALL, "--max-steps", 30, "--data", demo_shards, "--run-dir", tmp_path]
    succeed(train_command(1, *flags))
    rows = metrics(tmp_path)
    assert len(rows) == 30
    assert min(row["grad_norm/g"] for row in rows) > 1


def test_a_run_that_can_only_skip_its_steps_ends_with_what_was_seen(demo_shards: Path, tmp_path: Path) -> None:
    rates = ["--optimizer.lr-g", 1e30, "--optimizer.lr-d", 1e30, "--on-collapse", "warn"]
    flags = ["--preset", "debug", "--width", 4, *SMALL, *rates, "--max-steps", 200, "--data", demo_shards]
    done = run(train_command(2, *flags, "--run-dir", tmp_path / "run"))
    assert done.returncode != 0
    assert "error: training is stopped at step" in done.stderr and "most steps are skipped; " in done.stderr
    (dump,) = (tmp_path / "run").glob("not_finite-step-*.json")
    seen = json.loads(dump.read_text())
    assert any(summary["not_finite"] for summary in seen["gradients"].values())
    weights = [summary for name, summary in seen["tensors"].items() if name.endswith("weight")]
    assert weights and not any(summary["not_finite"] for summary in weights)
