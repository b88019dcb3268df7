"""A signal to any rank ends all ranks at the same step; one to torchrun ends the run with a checkpoint."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dist_dcgan.distributed import process_group
from dist_dcgan.training.checkpoint import list_checkpoints
from dist_dcgan.training.stopping import StopRequest
from tests.commands import metrics, start, train_command
from tests.ranks import run_ranks


def steps_until_stopped(asked_rank: int) -> list[int]:
    """Take up to 20 uneven steps; the asked rank gets a signal in its sixth. Return the steps taken."""
    with process_group(60, "cpu") as world, StopRequest() as stop:
        steps = []
        for step in range(20):
            time.sleep(0.01 * world.rank)
            if step == 5 and world.rank == asked_rank:
                os.kill(os.getpid(), signal.SIGTERM)
            dist.all_reduce(torch.ones(3))
            steps.append(step)
            if stop.agreed():
                break
        return steps


def test_a_signal_to_one_rank_stops_all_at_the_same_step() -> None:
    for asked_rank in (0, 1):
        assert run_ranks(2, steps_until_stopped, asked_rank) == [list(range(7))] * 2


def test_no_signal_stops_none() -> None:
    assert run_ranks(2, steps_until_stopped, -1) == [list(range(20))] * 2


def test_a_signal_to_torchrun_leaves_a_checkpoint_of_the_last_step(demo_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = ["--data", demo_shards, "--preset", "debug", "--width", 4, "--max-steps", 100_000, "--wandb", "disabled"]
    process = start(train_command(2, *flags, "--run-dir", run_dir))
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert (run_dir / "STOPPED").exists(), output
    last = metrics(run_dir)[-1]["step"]
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{last:08d}"
