"""Training as people start it: what it leaves, how it stops, and one line for every mistake."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from dist_dcgan import train
from dist_dcgan.run.checkpoint import list_checkpoints
from shards.conversion.convert import Settings, convert
from shards.conversion.sources.lmdb_source import LmdbSource
from tests.support.commands import metrics, module, one_line_error, run, start, succeed, train_command
from tests.support.mistakes import refusal
from tests.support.shards_fixtures import contents, photographs
from tests.support.waiting import rows_so_far, wait_until

DEBUG = ["--preset", "debug", "--wandb", "disabled"]


@pytest.mark.parametrize("width", [8, pytest.param(128, marks=pytest.mark.slow)])
def test_the_paper_preset_trains_on_two_ranks_and_leaves_everything(tmp_path: Path, width: int) -> None:
    shards, run_dir = tmp_path / "shards", tmp_path / "run"
    succeed(module("shards", "convert", photographs(tmp_path), "--out", shards, "--samples-per-shard", 64))
    succeed(module("shards", "verify", shards))
    flags = ["--preset", "paper", "--width", width, "--global-batch", 32, "--max-steps", 5, "--wandb", "disabled"]
    flags += ["--ema.statistics-images", 64]
    done = succeed(train_command(2, *flags, "--data", shards, "--run-dir", run_dir))

    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 5]
    wanted = "step images_seen loss/d loss/g score/real score/fake grad_norm/g grad_norm/d throughput/images_per_second"
    for row in rows:
        assert set(wanted.split()) | {"time/data_wait", "time/step"} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert rows[-1]["images_seen"] == 160
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step-00000005"]
    assert Image.open(run_dir / "samples" / "step-00000005.png").size == (8 * 66 + 2, 8 * 66 + 2)
    assert Image.open(run_dir / "curves.png").size[0] > 500
    description = json.loads((run_dir / "generator_ema.json").read_text())
    assert (description["step"], description["architecture"]["width"]) == (5, width)
    assert not (run_dir / "STOPPED").exists()
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "100.0%  step 5/5" in done.stderr

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run_dir, elsewhere, ignore=shutil.ignore_patterns("checkpoints"))
    succeed(module("dist_dcgan.sample", elsewhere, "--out", tmp_path / "a.png", "--seeds", "0-8"))
    succeed(module("dist_dcgan.sample", elsewhere, "--out", tmp_path / "b.png", "--seeds", "9-17"))
    assert Image.open(tmp_path / "a.png").size == (3 * 66 + 2, 3 * 66 + 2)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert "a.png exists" in one_line_error(module("dist_dcgan.sample", elsewhere, "--out", tmp_path / "a.png"))


@pytest.fixture(scope="module")
def finished(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    flags = [*DEBUG, "--width", 4, "--max-steps", 4, "--data", demo_shards]
    succeed(train_command(1, *flags, "--run-dir", run_dir))
    return run_dir


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "never"], "holds a run already"),
        (["--width", 8], "holds a run of another configuration (width: 4 -> 8)"),
        (["--seed", 1, "--noise.sigma", 0.1], "(seed: 0 -> 1; noise.sigma: 0.0 -> 0.1)"),
        (["--data", "other"], "was trained on another data set"),
        (["--run-dir", "file"], "run directory file cannot be used"),
        (["--run-dir", "file/run"], "run directory file/run cannot be used"),
        (["--run-dir", "."], "holds files but no run"),
        (["--world-size", 2], "start it as `torchrun --nproc_per_node=2 -m dist_dcgan.train`"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_and_changes_nothing(
    finished: Path,
    demo_shards: Path,
    demo_lmdb: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    convert([LmdbSource(demo_lmdb)], Path("other"), Settings(samples_per_shard=20), workers=1)
    shutil.copytree(finished, "run")
    for name in ("run/STOPPED", "file"):
        Path(name).write_text("mine")
    before = contents(tmp_path)
    usual = [*DEBUG, "--width", 4, "--max-steps", 9, "--data", demo_shards, "--run-dir", "run"]
    assert message in refusal(train.main, *usual, *flags)
    after = contents(tmp_path)
    holder = "run/run.holder.json"  # says who tried last
    assert after | {holder: before[holder]} == before


def test_a_signal_stops_at_a_step_and_a_second_writer_is_refused(demo_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = [*DEBUG, "--width", 4, "--max-steps", 100_000, "--data", demo_shards, "--run-dir", run_dir]
    process = start(train_command(1, *flags))
    wait_until(lambda: rows_so_far(run_dir) >= 3, process)
    refused = one_line_error(train_command(1, *flags))
    assert "is in use by" in refused
    assert str(process.pid) in refused
    process.send_signal(signal.SIGHUP)  # as a session that ends; SIGTERM: tests/faults
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / "STOPPED").read_text() == f"stopped by a signal at step {last}\n"
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{last:08d}"
    for _ in range(2):  # the second time there is nothing left to do
        succeed(train_command(1, *flags, "--max-steps", last + 2))
        assert [row["step"] for row in metrics(run_dir)] == list(range(1, last + 3))
    assert not (run_dir / "STOPPED").exists()


def test_a_signal_before_the_first_batch_ends_at_once(demo_shards: Path, tmp_path: Path) -> None:
    """The shards never come; the command that would bring them ends, too."""
    script = tmp_path / "bring.sh"
    script.write_text(
        f'[ "$1" != manifest.json ] || exec cat "{demo_shards}/$1"\ntouch "{tmp_path}/asked"; exec sleep 300\n'
    )
    flags = [*DEBUG, "--width", 4, "--data", f"pipe:exec bash {script} {{}}", "--allow-commands"]
    flags += ["--data.cache-dir", tmp_path / "cache", "--run-dir", tmp_path / "run"]
    process = start(train_command(1, *flags))
    wait_until((tmp_path / "asked").exists, process)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(timeout=20))
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "ended by SIGTERM before the first step: the same command starts it again" in output
    assert not (tmp_path / "run" / "STOPPED").exists()


def test_a_dry_run_prints_the_plan_and_creates_nothing(demo_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", demo_shards, "--run-dir", tmp_path / "run", "--global-batch", 64, "--dry-run"]
    flags += ["--data.cache-dir", tmp_path / "new" / "cache"]
    output = succeed(module("dist_dcgan.train", *flags, "--world-size", 64)).stdout
    for line in (
        "width: 128",
        "generator:         12,658,432 parameters",
        "discriminator:     11,036,160 parameters",
        "ranks:             64",
        "global batch:      64, 1 per rank",
        "steps per epoch:   1",
        "steps in all:      5 (5.00 epochs)",
    ):
        assert line in output
    assert "`python -m dist_dcgan.doctor`" in output.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_torchrun_says_a_mistake_once(demo_shards: Path, tmp_path: Path) -> None:
    done = run(train_command(2, "--data", demo_shards, "--run-dir", tmp_path / "run", "--global-batch", 7))
    assert done.returncode != 0
    assert done.stderr.count("error: global_batch 7 is not divisible by 2 ranks: use --global-batch 6 or 8") == 1
    assert not (tmp_path / "run").exists()
