"""The folder of a run: what lies where, who may write to it, and whether a run may go on in it.

python -m dist_dcgan.run.directory FLAGS OF TRAINING: print where these flags put it; launchers ask.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dist_dcgan.config import Config, differences, from_command_line, read_yaml, to_yaml
from dist_dcgan.distributed.collectives import from_rank_zero
from shards.common.command_line import build
from shards.common.command_line import run as run_command
from shards.common.errors import UserError
from shards.common.files import publish

LOGS = "logs"
"""Folder of what ranks printed, where launch/ keeps it."""
_LOCK = "run.lock"
_HOLDER = "run.holder.json"


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
    def best(self) -> Path:
        """The averaged generator with the lowest kernel distance so far."""
        return self.path / "generator_best.safetensors"

    @property
    def stopped(self) -> Path:
        """Marker of a run that a signal ended before its last step: a launcher starts it again."""
        return self.path / "STOPPED"


@contextmanager
def claimed_for_all(run: RunDirectory, config: Config, resume: str) -> Iterator[None]:
    """Have rank 0 hold the folder for all ranks as `claimed` does; its UserError is raised on all of them."""
    with ExitStack() as held:
        from_rank_zero(lambda: held.enter_context(claimed(run, config, resume)))
        yield


@contextmanager
def claimed(run: RunDirectory, config: Config, resume: str) -> Iterator[None]:
    """Hold the folder as its only writer, after checking that this configuration may go on there.

    Raises UserError where another process holds it, where it holds something else than a run, or a run of another
    configuration, and where `resume` is "never" and there is a run already. Nothing is changed then.
    """
    require_fitting(run, config, resume)
    lock = _lock(run.path)
    try:
        yield
    finally:
        lock.release()


def require_fitting(run: RunDirectory, config: Config, resume: str) -> None:
    """Raise UserError where this configuration may not go on in the folder, whoever holds it; changes nothing."""
    is_run = run.config.is_file()
    if not is_run and run.path.is_dir() and any(_is_content(entry.name) for entry in run.path.iterdir()):
        raise UserError(f"run directory {run.path} holds files but no run: name an empty or new one with --run-dir")
    if is_run and resume == "never":
        raise UserError(f"run directory {run.path} holds a run already: name another with --run-dir, or drop --resume")
    if is_run:
        stored = build(Config, read_yaml(run.config), where=str(run.config))
        _require_equal(f"run directory {run.path} holds a run", stored, config)


def _is_content(name: str) -> bool:
    """Return whether a file is more than what launchers and locks leave before a run begins."""
    return not name.startswith("run.") and name != LOGS


def require_unclaimed(run: RunDirectory) -> None:
    """Raise UserError, with the holder, where a process holds the folder; changes nothing."""
    with _errors(run.path):
        if (run.path / _LOCK).exists():
            FileLock(run.path / _LOCK, timeout=0).acquire().lock.release()


def record(run: RunDirectory, config: Config) -> None:
    """Store the configuration that the run now goes on with; it is not stopped any more."""
    publish(run.config, to_yaml(config).encode())
    run.stopped.unlink(missing_ok=True)


def require_same_run(
    run: RunDirectory, config: Config, global_batch: int, digest: str, values: Mapping[str, Any]
) -> None:
    """Raise UserError where the values of its newest checkpoint are of another data set, global batch or configuration.

    The checkpoint may have been put there from another run.
    """
    if values["manifest_digest"] != digest:
        raise UserError(
            f"run directory {run.path} was trained on another data set: name that one with --data, or another --run-dir"
        )
    if values["global_batch"] != global_batch:
        raise UserError(
            f"run directory {run.path} was trained with global batch {values['global_batch']}, this start makes it "
            f"{global_batch}: give --global-batch {values['global_batch']}"
        )
    stored = build(Config, values["config"], where=f"the newest checkpoint in {run.checkpoints}")
    _require_equal(f"the newest checkpoint in {run.checkpoints} is", stored, config)


def _lock(path: Path) -> FileLock:
    lock = FileLock(path / _LOCK, timeout=0)
    with _errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": started}
        publish(path / _HOLDER, json.dumps(who).encode())
    return lock


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Say what keeps the folder from being held."""
    try:
        yield
    except Timeout:
        holder = path / _HOLDER
        who = holder.read_text() if holder.is_file() else "an unknown process"
        raise UserError(f"run directory {path} is in use by {who}: wait for it, or name another") from None
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        raise UserError(f"run directory {path} cannot be used: {error}: name another with --run-dir") from None


def _require_equal(what: str, stored: Config, config: Config) -> None:
    changed = differences(stored, config)
    if changed:
        raise UserError(
            f"{what} of another configuration ({'; '.join(changed)}): use the same, or name another with --run-dir"
        )


def main(argv: Sequence[str]) -> None:
    """Print the run directory that the flags of training name."""
    print(from_command_line(argv)[0].run_dir)


if __name__ == "__main__":
    run_command(main)
