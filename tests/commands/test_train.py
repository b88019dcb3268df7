"""Training as people start it: what it leaves, how it stops, and one line for every mistake."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from dist_dcgan.run.checkpoint import list_checkpoints
from tests.support.commands import environment, metrics, module, one_line_error, run, start, succeed, train_command

DEBUG = ["--preset", "debug", "--wandb", "disabled"]


def photographs(tmp_path: Path, demo_lmdb: Path) -> Path:
    """Real photographs in LSUN's format where the machine has some, else the rendered ones."""
    folder = os.environ.get("DIST_DCGAN_PHOTOS")
    if folder is None:
        return demo_lmdb
    with zipfile.ZipFile(Path(folder) / "clothing_val_lmdb.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / "clothing_val_lmdb"


def test_the_paper_preset_trains_on_two_ranks_and_leaves_everything(tmp_path: Path, demo_lmdb: Path) -> None:
    shards, run_dir = tmp_path / "shards", tmp_path / "run"
    source = photographs(tmp_path, demo_lmdb)
    succeed(module("shards", "convert", source, "--out", shards, "--samples-per-shard", 64))
    succeed(module("shards", "verify", shards))
    flags = ["--preset", "paper", "--global-batch", 32, "--max-steps", 5, "--wandb", "disabled"]
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
    assert (description["step"], description["architecture"]["width"]) == (5, 128)
    assert not (run_dir / "STOPPED").exists()
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "100.0%  step 5/5" in done.stderr

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run_dir, elsewhere, ignore=shutil.ignore_patterns("checkpoints"))
    succeed(module("dist_dcgan.sample", elsewhere, "--out", tmp_path / "a.png", "--num", 9))
    succeed(module("dist_dcgan.sample", elsewhere, "--out", tmp_path / "b.png", "--num", 9, "--seed", 1))
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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_more_steps_go_on_and_the_same_are_done_at_once(finished: Path, demo_shards: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    flags = [*DEBUG, "--width", 4, "--data", demo_shards, "--run-dir", run_dir]
    succeed(train_command(1, *flags, "--max-steps", 6))
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    before = metrics(run_dir)
    succeed(train_command(1, *flags, "--max-steps", 6))
    assert metrics(run_dir) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "never"], "holds a run already"),
        (["--width", "8"], "holds a run of another configuration (width: 4 -> 8)"),
        (["--seed", "1", "--noise.sigma", "0.1"], "(seed: 0 -> 1; noise.sigma: 0.0 -> 0.1)"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_unchanged(
    finished: Path, demo_shards: Path, flags: list[str], message: str
) -> None:
    before = contents(finished)
    usual = [*DEBUG, "--width", 4, "--max-steps", 9, "--data", demo_shards, "--run-dir", finished]
    assert message in one_line_error(train_command(1, *usual, *flags))
    assert contents(finished) == before


def test_another_data_set_is_refused(finished: Path, demo_lmdb: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    succeed(module("shards", "convert", demo_lmdb, "--out", tmp_path / "other", "--samples-per-shard", 20))
    (run_dir / "STOPPED").write_text("stopped")
    before = contents(run_dir)
    flags = [*DEBUG, "--width", 4, "--max-steps", 9, "--data", tmp_path / "other", "--run-dir", run_dir]
    assert "was trained on another data set" in one_line_error(train_command(1, *flags))
    after = contents(run_dir)
    after[str(run_dir / "run.holder.json")] = before[str(run_dir / "run.holder.json")]  # says who tried last
    assert after == before


def test_a_run_directory_that_cannot_be_made_is_named(demo_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        flags = [*DEBUG, "--width", 4, "--data", demo_shards, "--run-dir", run_dir]
        assert f"run directory {run_dir} cannot be used" in one_line_error(train_command(1, *flags))
    assert contents(tmp_path) == {str(tmp_path / "file"): b"mine"}


def test_a_run_directory_that_is_none_is_refused_unchanged(demo_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds files but no run" in one_line_error(
        train_command(1, *DEBUG, "--data", demo_shards, "--run-dir", tmp_path)
    )
    assert contents(tmp_path) == {str(tmp_path / "thesis.txt"): b"mine"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_a_step_and_a_second_writer_is_refused(
    demo_shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    flags = [*DEBUG, "--width", 4, "--max-steps", 100_000, "--data", demo_shards, "--run-dir", run_dir]
    process = start(train_command(1, *flags))
    while not (run_dir / "metrics.jsonl").exists() or len(metrics_so_far(run_dir)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    refusal = one_line_error(train_command(1, *flags))
    assert "is in use by" in refusal
    assert str(process.pid) in refusal
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    last = metrics(run_dir)[-1]["step"]
    assert (run_dir / "STOPPED").read_text() == f"stopped by a signal at step {last}\n"
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{last:08d}"
    succeed(train_command(1, *[flag if flag != 100_000 else last + 2 for flag in flags]))
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, last + 3))
    assert not (run_dir / "STOPPED").exists()


def metrics_so_far(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_dry_run_prints_the_plan_and_creates_nothing(demo_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", demo_shards, "--run-dir", tmp_path / "run", "--global-batch", 64, "--dry-run"]
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "no data set at nowhere: make one with `python -m shards convert LMDB --out nowhere`"),
        ([], "no data set at data/bedroom_train: make one with"),
        (["--data", "."], "no data set at .: it has no manifest.json"),
        (["--data", "DATA", "--global-batch", "97"], "global batch 97 is larger than the data set of 96 images"),
        (["--data", "DATA", "--world-size", "2"], "start it as `torchrun --nproc_per_node=2 -m dist_dcgan.train`"),
        (["--data", "DATA", "--world-size", "3", "--dry-run"], "global_batch 128 is not divisible by 3 ranks"),
        (["--data", "DATA", "--preset", "narow"], "unknown preset 'narow'; did you mean narrow?"),
        (["--dta", "DATA"], "unknown option --dta; did you mean --data?"),
        (["--config", "evil.yaml"], "evil.yaml is not plain YAML"),
        (["--data", "newer"], "version 99; this version reads"),
    ],
)
def test_a_mistake_gets_one_line(demo_shards: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "evil.yaml").write_text("width: !!python/object/apply:os.system ['touch pwned']\n")
    (tmp_path / "newer").mkdir()
    manifest = json.loads((demo_shards / "manifest.json").read_text())
    (tmp_path / "newer" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    before = sorted(tmp_path.iterdir())
    words = [str(demo_shards) if flag == "DATA" else flag for flag in flags]
    paths = environment() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = run(module("dist_dcgan.train", *words), cwd=tmp_path, env=paths)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_torchrun_says_a_mistake_once(demo_shards: Path, tmp_path: Path) -> None:
    done = run(train_command(2, "--data", demo_shards, "--run-dir", tmp_path / "run", "--global-batch", 7))
    assert done.returncode != 0
    assert done.stderr.count("error: global_batch 7 is not divisible by 2 ranks: use --global-batch 6 or 8") == 1
    assert not (tmp_path / "run").exists()
