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

import pytest

from dist_dcgan.run.checkpoint import Checkpoint, list_checkpoints, load_newest
from tests.support.commands import metrics, start, succeed, train_command
from tests.support.forks import Forked
from tests.support.waiting import wait_until

STEPS = 40
FLAGS = ["--width", 8, "--global-batch", 16, "--noise.sigma", 0.3]
FLAGS += ["--log.every-steps", 1, "--wandb", "disabled"]
TIMINGS = ("time/", "throughput/")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])  # fp32 is the fault bench's
def test_four_ranks_that_save_by_the_clock_end_bit_identical_after_a_kill(
    demo_shards: Path, tmp_path: Path, precision: str
) -> None:
    """Four, as DDP's order of summation is that of two ranks whatever it does; two are the fault bench's."""
    undisturbed, killed = tmp_path / "golden", tmp_path / "run"
    flags = ["--data", demo_shards, *FLAGS, "--max-steps", STEPS, "--precision", precision]
    succeed(train_command(4, *flags, "--run-dir", undisturbed))
    assert [path.name for path in list_checkpoints(undisturbed / "checkpoints")] == [f"step-{STEPS:08d}"]
    flags += ["--checkpoint.every-minutes", 0.1 / 60, "--run-dir", killed]
    process = start(train_command(4, *flags))
    wait_until(lambda: len(list_checkpoints(killed / "checkpoints")) >= 2, process)
    kill_rank_zero(process, killed)
    assert newest(killed).values["step"] < STEPS
    succeed(train_command(4, *flags))

    rows, expected = ([comparable(row) for row in metrics(run)] for run in (killed, undisturbed))
    assert rows == expected and len(rows) == STEPS
    found, wanted = newest(killed), newest(undisturbed)
    assert found.values["step"] == wanted.values["step"] == STEPS
    assert bytes_of(found) == bytes_of(wanted)
    for scaler in ("scaler_g", "scaler_d"):
        assert found.values[scaler] == wanted.values[scaler]
        assert (wanted.values[scaler]["scale"] == 1) == (precision != "fp16")
    if precision == "fp16":  # the first scale overflows in D, so that there is something to lose
        assert wanted.values["scaler_d"]["scale"] < 65536


def test_a_checkpoint_that_cannot_be_written_ends_the_run_on_all_ranks(demo_shards: Path, tmp_path: Path) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    flags = ["--data", demo_shards, *FLAGS, "--width", 4, "--global-batch", 8, "--max-steps", 10_000]
    process = start(train_command(2, *flags, "--checkpoint.every-steps", 30, "--run-dir", run_dir))
    wait_until((run_dir / "checkpoints" / "step-00000030").is_dir, process)
    time.sleep(0.3)  # its writing ends, and the next has not begun
    (run_dir / "checkpoints").rename(moved)
    (run_dir / "checkpoints").touch()
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "cannot be written: Not a directory: mend that, and the same command goes on" in output
    assert "Connection closed by peer" not in output  # both ranks ended for that reason
    assert load_newest(moved) is not None


def kill_rank_zero(process: subprocess.Popen[str] | Forked, run_dir: Path) -> None:
    """Kill it, and see that the run had not ended."""
    os.kill(json.loads((run_dir / "run.holder.json").read_text())["pid"], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, output
    assert not (run_dir / "generator_ema.safetensors").exists(), "the run ended before it was killed"


def comparable(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith(TIMINGS)}


def newest(run_dir: Path) -> Checkpoint:
    found = load_newest(run_dir / "checkpoints")
    assert found is not None
    return found


def bytes_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in checkpoint.tensors.items()}
