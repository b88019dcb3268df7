"""Killed and started again by the same command, a run ends as if nothing had happened (promise 7 of the design).

Promise 7 (checkpoints) of dist_dcgan/README.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from dist_dcgan.run.checkpoint import list_checkpoints, load_newest
from tests.support.commands import metrics, start, succeed, train_command

STEPS = 8
CLOCK_STEPS = 100
FLAGS = ["--width", 8, "--global-batch", 16, "--noise.sigma", 0.3, "--max-steps", STEPS]
FLAGS += ["--log.every-steps", 1, "--wandb", "disabled"]
TIMINGS = ("time/", "throughput/")


def test_four_ranks_that_were_killed_end_bit_identical(demo_shards: Path, tmp_path: Path) -> None:
    """Four, as DDP's order of summation is that of two ranks whatever it does; two are the fault bench's."""
    undisturbed, killed = tmp_path / "golden", tmp_path / "run"
    succeed(train_command(4, "--data", demo_shards, *FLAGS, "--run-dir", undisturbed))
    flags = ["--data", demo_shards, *FLAGS, "--checkpoint.every-steps", 4, "--run-dir", killed]
    kill_after_checkpoint(train_command(4, *flags), killed, 4)
    succeed(train_command(4, *flags))

    assert [comparable(row) for row in metrics(killed)] == [comparable(row) for row in metrics(undisturbed)]
    assert len(metrics(undisturbed)) == STEPS
    assert final_tensors(killed) == final_tensors(undisturbed)


def test_two_ranks_that_save_by_the_clock_end_bit_identical_after_a_kill(demo_shards: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "golden", tmp_path / "run"
    flags = ["--data", demo_shards, *FLAGS, "--max-steps", CLOCK_STEPS]
    succeed(train_command(2, *flags, "--run-dir", undisturbed))
    assert [path.name for path in list_checkpoints(undisturbed / "checkpoints")] == [f"step-{CLOCK_STEPS:08d}"]
    flags += ["--checkpoint.every-minutes", 0.1 / 60, "--run-dir", killed]
    process = start(train_command(2, *flags))
    while len(list_checkpoints(killed / "checkpoints")) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    kill_rank_zero(process, killed)
    assert newest_step(killed) < CLOCK_STEPS
    succeed(train_command(2, *flags))

    assert [comparable(row) for row in metrics(killed)] == [comparable(row) for row in metrics(undisturbed)]
    assert final_tensors(killed, CLOCK_STEPS) == final_tensors(undisturbed, CLOCK_STEPS)


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


def kill_after_checkpoint(command: list[str], run_dir: Path, step: int) -> None:
    """Kill rank 0 as soon as the checkpoint of `step` is there, before the run ends."""
    process = start(command)
    checkpoint = run_dir / "checkpoints" / f"step-{step:08d}"
    while not checkpoint.is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    kill_rank_zero(process, run_dir)


def kill_rank_zero(process: subprocess.Popen[str], run_dir: Path) -> None:
    """Kill it, and see that the run had not ended."""
    os.kill(json.loads((run_dir / "run.holder.json").read_text())["pid"], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, output
    assert not (run_dir / "generator_ema.safetensors").exists(), "the run ended before it was killed"


def comparable(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith(TIMINGS)}


def newest_step(run_dir: Path) -> int:
    found = load_newest(run_dir / "checkpoints")
    assert found is not None
    return int(found.values["step"])


def final_tensors(run_dir: Path, steps: int = STEPS) -> dict[str, bytes]:
    found = load_newest(run_dir / "checkpoints")
    assert found is not None
    tensors, values = found
    assert values["step"] == steps
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
