"""Real commands as a user types them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.forks import Forked, may_fork

SECONDS = 600


def environment() -> dict[str, str]:
    """The environment of a user's shell: no rank, no W&B, no GPU, one thread so that runs repeat to the bit."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "LOCAL_", "WANDB"))
    }
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def module(name: str, *arguments: object) -> list[str]:
    """`python -m NAME ARGUMENTS`."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def train_command(ranks: int, *arguments: object) -> list[str]:
    """Training on `ranks` CPU processes: plain python for one, torchrun for more."""
    if ranks == 1:
        return module("dist_dcgan.train", "--world-size", 1, *arguments)
    torchrun = ["--standalone", f"--nproc_per_node={ranks}", "-m", "dist_dcgan.train"]
    return module("torch.distributed.run", *torchrun, *arguments)


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end and return exit status and output; forked if that makes no difference (`tests.support.forks`)."""
    options = {"env": environment()} | options
    if not may_fork(command, options):
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, **options)
    process = Forked(command, joined=False, **options)
    try:
        output, errors = process.communicate(SECONDS)
    finally:
        process.kill()  # one that has not ended
    return subprocess.CompletedProcess(command, process.wait(), output, errors)


def succeed(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end and require exit status 0."""
    done = run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start(command: list[str], **options: Any) -> subprocess.Popen[str] | Forked:
    """Start in the background, forked if that makes no difference; `communicate` returns all output."""
    options = {"env": environment()} | options
    if may_fork(command, options):
        return Forked(command, joined=True, **options)
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def one_line_error(command: list[str], **options: Any) -> str:
    """Run, require exit status 2 and one line on stderr, and return it."""
    done = run(command, **options)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
