"""Weights & Biases in a separate process that training starts, ends and may kill."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from dist_dcgan.config import Config
from dist_dcgan.loggers.base import Logger, warn
from dist_dcgan.loggers.wandb_process import UNSENT, close_seconds, holds_rows
from dist_dcgan.run.directory import RunDirectory


class WandbLogger(Logger):
    """Starts a process that reads metrics.jsonl and the pictures and uploads them.

    Training sends it no data: a client that hangs, fails or uses CPU time cannot delay training, its threads, exit
    hooks and signals stay out of this process, and it can read again what it missed.
    """

    _IMPORT_SECONDS = 60
    _SLACK_SECONDS = 0.5  # for the process to reach its own limit and report

    def __init__(self, config: Config, run: RunDirectory, run_id: str) -> None:
        """Start the process, which uploads what is logged from now on."""
        self._run, self._run_id = run, run_id
        self._close_seconds = close_seconds(config.wandb.mode)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dist_dcgan.loggers.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C must reach only training, which then ends the process
        )
        order = {
            "run_dir": str(run.path.resolve()),
            "run_id": run_id,
            "mode": config.wandb.mode,
            "project": config.wandb.project,
            "name": config.wandb.name or run.path.resolve().name,
            "config": without_secrets(config.model_dump(mode="json")),
            "offset": run.metrics.stat().st_size if run.metrics.exists() else 0,
            "pictures": _pictures(run.samples),
            "pid": os.getpid(),
        }
        self._write(json.dumps(order).encode() + b"\n")

    def metrics(self, row: Mapping[str, float]) -> None:
        """Do nothing: the process reads metrics.jsonl."""

    def samples(self, step: int, draw: Callable[[], Tensor]) -> None:
        """Do nothing: the process finds pictures by itself."""

    def alert(self, step: int, text: str) -> None:
        """Do nothing: alerts are in metrics.jsonl."""

    def close(self) -> None:
        """Wait for the upload, at most 5 seconds (30 offline) after wandb's import; print how to upload the rest."""
        self._write(b"\n")  # without it the run counts as crashed
        with contextlib.suppress(OSError):
            self._stdin.close()
        self._wait_for_import()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._close_seconds + self._SLACK_SECONDS)
        if self._process.returncode is None:
            warn("W&B did not end in time and is killed")
        elif self._process.returncode != 0:
            warn(f"W&B's process ended with status {self._process.returncode}")
        # the process's children are in its session, except wandb-core, which ends after its parent
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        command = sync_command(self._run.path, self._run_id)
        if command is not None:
            print(f"W&B: to upload what it does not have yet: {command}", file=sys.stderr, flush=True)

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def _write(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the process is gone: `close` reports why
            self._stdin.write(message)
            self._stdin.flush()

    def _wait_for_import(self) -> None:
        """Wait until the process reports the import of wandb, or has ended."""
        assert self._process.stdout is not None
        waiting = select.poll()  # unlike select, poll takes any descriptor
        waiting.register(self._process.stdout, select.POLLIN)
        waiting.poll(1000 * self._IMPORT_SECONDS)


def sync_command(run_dir: Path, run_id: str) -> str | None:
    """Return the command that uploads what W&B's server lacks of a run, None if it lacks nothing."""
    segments = run_dir.resolve().glob(f"wandb/*run-*-{run_id}*")
    left = sorted(segment for segment in segments if _is_left(segment))
    if not left:
        return None
    return shlex.join(["wandb", "sync", "--include-online", *map(str, left)])


def without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without possible passwords: parts of the data set's address, or its command."""
    path = str(config["data"]["path"])
    if path.startswith("pipe:"):
        path = "pipe:"
    elif "://" in path:
        address = urlsplit(path)
        path = address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return config | {"data": config["data"] | {"path": path}}


def _is_left(segment: Path) -> bool:
    if any(segment.glob("*.wandb.synced")) or not any(map(holds_rows, segment.glob("*.wandb"))):
        return False  # uploaded by `wandb sync`, or empty
    return segment.name.startswith("offline-run-") or (segment / UNSENT).exists()


def _pictures(directory: Path) -> dict[str, int]:
    """Return the modification times, in ns, of the pictures; a picture that is drawn again gets a new one."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("step-*.png")}
