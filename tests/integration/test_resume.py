"""Killed and started again by the same command, a run ends as if nothing had happened (promise 7 of the design)."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_dcgan.training.checkpoint import load_newest
from tests.commands import metrics, start, succeed, train_command

STEPS = 8
FLAGS = ["--width", 8, "--global-batch", 16, "--noise.sigma", 0.3, "--max-steps", STEPS]
FLAGS += ["--log.every-steps", 1, "--wandb", "disabled"]
TIMINGS = ("time/", "throughput/")


@dataclass(frozen=True)
class Golden:
    ranks: int
    run_dir: Path


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def golden(request: pytest.FixtureRequest, demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """A run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("golden") / "run"
    succeed(train_command(request.param, "--data", demo_shards, *FLAGS, "--run-dir", run_dir))
    return Golden(request.param, run_dir)


def test_a_killed_run_ends_bit_identical(golden: Golden, demo_shards: Path, tmp_path: Path) -> None:
    kills, every = ([2, 4, 6], 2) if golden.ranks == 2 else ([4], 4)
    killed = tmp_path / "run"
    flags = ["--data", demo_shards, *FLAGS, "--checkpoint.every-steps", every, "--run-dir", killed]
    for step in kills:
        kill_after_checkpoint(train_command(golden.ranks, *flags), killed, step)
    succeed(train_command(golden.ranks, *flags))

    assert [comparable(row) for row in metrics(killed)] == [comparable(row) for row in metrics(golden.run_dir)]
    assert len(metrics(golden.run_dir)) == STEPS
    assert final_tensors(killed) == final_tensors(golden.run_dir)


def test_another_seed_ends_differently(golden: Golden, demo_shards: Path, tmp_path: Path) -> None:
    if golden.ranks == 4:
        pytest.skip("2 ranks say it all")
    succeed(train_command(2, "--data", demo_shards, *FLAGS, "--run-dir", tmp_path / "run", "--seed", 1))
    assert final_tensors(tmp_path / "run") != final_tensors(golden.run_dir)


def test_nobody_trains_on_when_torchrun_is_killed(demo_shards: Path, tmp_path: Path) -> None:
    flags = ["--data", demo_shards, *FLAGS, "--max-steps", 10_000, "--run-dir", tmp_path / "run"]
    process = start(train_command(2, *flags))
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    ranks = children(process.pid)
    assert len(ranks) == 2
    process.kill()
    time.sleep(2)
    assert not [rank for rank in ranks if alive(rank)]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_on_all_ranks(demo_shards: Path, tmp_path: Path) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    flags = ["--data", demo_shards, *FLAGS, "--max-steps", 10_000, "--checkpoint.every-steps", 50, "--run-dir", run_dir]
    process = start(train_command(2, *flags))
    while not (run_dir / "checkpoints" / "step-00000050").is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(0.3)  # its writing ends, and the next has not begun
    (run_dir / "checkpoints").rename(moved)
    (run_dir / "checkpoints").touch()
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "cannot be written: Not a directory: mend that, and the same command goes on" in output
    assert "Connection closed by peer" not in output  # both ranks ended for that reason
    assert load_newest(moved) is not None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(pid), "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_after_checkpoint(command: list[str], run_dir: Path, step: int) -> None:
    """Kill rank 0 as soon as the checkpoint of `step` is there, before the run ends."""
    process = start(command)
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    while not checkpoint.is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(json.loads((run_dir / "run.holder.json").read_text())["pid"], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, output
    assert not (run_dir / "generator_ema.safetensors").exists(), "the run ended before it was killed"


def comparable(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith(TIMINGS)}


def final_tensors(run_dir: Path) -> dict[str, bytes]:
    found = load_newest(run_dir / "checkpoints")
    assert found is not None
    tensors, values = found
    assert values["step"] == STEPS
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
