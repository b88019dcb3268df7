"""Weights & Biases in a separate process that training starts, ends and may kill."""

from __future__ import annotations

import contextlib
import glob
import os
import select
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path

from dist_dcgan.loggers.base import Logger
from dist_dcgan.loggers.wandb_process import IMPORTING, UNSENT, Task, holds_rows, picture_times
from dist_dcgan.loggers.wandb_settings import WandbRun, has_home
from dist_dcgan.run.directory import RunDirectory
from shards.common.environment import SAFE_DIRECTORY
from shards.common.messages import tell, warn

_PATHS = (
    *("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "WANDB_IDENTITY_TOKEN_FILE"),
    *("NETRC", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"),
)
"""Variables with a path of the client's files, which may be relative to the working directory."""


class WandbLogger(Logger):
    """Starts a process that reads the run directory and uploads metrics, alerts and pictures.

    Training sends it no data: a client that hangs, fails or uses CPU time cannot delay training, its threads, exit
    hooks and signals stay out of this process, and it can read again what it missed.
    """

    _IMPORT_SECONDS = 60.0
    _SLACK_SECONDS = 0.5  # for the process to reach its own limit and report

    def __init__(self, run: RunDirectory, wandb_run: WandbRun) -> None:
        """Start the process, which uploads what is logged from now on."""
        assert wandb_run.run_id is not None
        self._run, self._run_id = run, wandb_run.run_id
        # A network that hangs must not delay the end of a run; offline, writing to disk takes longer but finishes.
        self._seconds = 30.0 if wandb_run.mode == "offline" else 5.0
        task = Task(
            run_dir=str(run.path.resolve()),
            run_id=wandb_run.run_id,
            project=wandb_run.project,
            name=wandb_run.name,
            resume=wandb_run.resume,
            mode=wandb_run.mode,
            seconds=self._seconds - self._SLACK_SECONDS,
            offset=run.metrics.stat().st_size if run.metrics.exists() else 0,
            pictures_since=max(picture_times(run.samples).values(), default=0),
        )
        # wandb fails without a home, and obeys the settings in one: no folder that may come from others can be it.
        self._home = None if has_home() else tempfile.TemporaryDirectory(prefix="wandb-", ignore_cleanup_errors=True)
        home = {} if self._home is None else {"HOME": self._home.name}
        self._process = subprocess.Popen(
            task.command(),
            cwd=SAFE_DIRECTORY,
            env=os.environ | _absolute_paths() | home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C must reach only training, which then ends the process
        )

    def close(self) -> None:
        """Wait for the upload, at most 5 seconds (30 offline) after wandb's import; print how to upload the rest."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the process has ended
            self._process.stdin.write(b"\n")  # without it the run counts as crashed
            self._process.stdin.close()
        state: bytes | None = IMPORTING
        while state:
            state = self._next_state(self._IMPORT_SECONDS if state == IMPORTING else self._seconds)
        if state is None:
            warn("W&B did not end in time and is killed")
        elif self._process.wait() != 0:
            warn(f"W&B's process ended with status {self._process.returncode}")
        # the process's children are in its session, except wandb-core, which ends after its parent
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._home is not None:
            self._home.cleanup()
        command = sync_command(self._run.path, self._run_id)
        if command is not None:
            tell(f"W&B: to upload what it does not have yet: {command}")

    def _next_state(self, seconds: float) -> bytes | None:
        """Return what the process reports next, empty if it ends, None if it does neither in time."""
        assert self._process.stdout is not None
        waiting = select.poll()  # unlike select, poll takes any descriptor
        waiting.register(self._process.stdout, select.POLLIN)
        return os.read(self._process.stdout.fileno(), 1) if waiting.poll(1000 * seconds) else None


def _absolute_paths() -> dict[str, str]:
    """Return the variables of _PATHS for a process with another working directory."""
    given = {name: os.path.expanduser(os.environ[name]) for name in _PATHS if os.environ.get(name)}
    # Without a home, `~` is left to the process, which has one.
    return {name: os.path.abspath(path) for name, path in given.items() if has_home() or not path.startswith("~")}


def sync_command(run_dir: Path, run_id: str) -> str | None:
    """Return the command that uploads what W&B's server lacks of a run, None if it lacks nothing."""
    files = run_dir.resolve().glob(f"wandb/*run-*/run-{glob.escape(run_id)}.wandb")
    left = sorted({file.parent for file in files if _is_left(file.parent)})
    if not left:
        return None
    return shlex.join(["wandb", "sync", "--include-online", *map(str, left)])


def _is_left(segment: Path) -> bool:
    if any(segment.glob("*.wandb.synced")) or not any(map(holds_rows, segment.glob("*.wandb"))):
        return False  # uploaded by `wandb sync`, or empty
    return segment.name.startswith("offline-run-") or (segment / UNSENT).exists()
