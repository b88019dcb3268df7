"""The folder of a run: what lies where, who may write to it, and whether a run may go on in it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from dist_dcgan.config import Config, differences, read_yaml, to_yaml
from shards.command_line import build
from shards.errors import UserError
from shards.files import publish


@dataclass(frozen=True)
class RunDirectory:
    """Names of the files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Folder of sample grids."""
        return self.path / "samples"

    @property
    def curves(self) -> Path:
        """Picture of the metrics."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def generator(self) -> Path:
        """The averaged generator's weights; a JSON beside them says how to rebuild it."""
        return self.path / "generator_ema.safetensors"

    @property
    def stopped(self) -> Path:
        """Marker of a run that a signal ended before its last step: a launcher starts it again."""
        return self.path / "STOPPED"


@contextmanager
def claimed(run: RunDirectory, config: Config, resume: str) -> Iterator[None]:
    """Hold the folder as its only writer: check that this configuration may go on there, and record it.

    Raises UserError where another process holds it, where it holds something else than a run, or a run of another
    configuration, and where `resume` is "never" and there is a run already. Nothing is changed then.
    """
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"run directory {run.path} is a file: name another with --run-dir")
    is_run = run.config.is_file()
    if run.path.exists() and not is_run and any(not entry.name.startswith("run.") for entry in run.path.iterdir()):
        raise UserError(f"run directory {run.path} holds files but no run: name an empty or new one with --run-dir")
    if is_run and resume == "never":
        raise UserError(f"run directory {run.path} holds a run already: name another with --run-dir, or drop --resume")
    if is_run:
        _require_same_run(run, config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with _only_writer(run.path):
            publish(run.config, to_yaml(config).encode())
            run.stopped.unlink(missing_ok=True)
            yield
    except PermissionError as error:
        raise UserError(f"run directory {run.path} cannot be written: {error}") from None


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    holder = path / "run.holder.json"
    try:
        with FileLock(path / "run.lock", timeout=0):
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            publish(holder, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": started}).encode())
            yield
    except Timeout:
        who = holder.read_text() if holder.is_file() else "an unknown process"
        raise UserError(f"run directory {path} is in use by {who}: wait for it, or name another") from None


def _require_same_run(run: RunDirectory, config: Config) -> None:
    stored = build(Config, read_yaml(run.config), where=str(run.config))
    changed = differences(stored, config)
    if changed:
        raise UserError(
            f"run directory {run.path} holds a run of another configuration ({'; '.join(changed)}): "
            "use the same, or name another with --run-dir"
        )
