"""The folder of a run: its files, its lock, and whether a configuration may continue in it.

python -m dist_dcgan.run.directory FLAGS OF TRAINING         for launchers: prints its path, if they may write in it
python -m dist_dcgan.run.directory logs FLAGS OF TRAINING    the same, after making its folder of logs
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dist_dcgan.config import Config, differences, from_command_line, to_yaml
from shards.common.command_line import build
from shards.common.command_line import run as run_command
from shards.common.errors import UserError
from shards.common.files import (
    ForeignLinkError,
    final_name,
    open_folder,
    publish,
    read_plain,
    remove_leftovers,
    require_own_folder,
)
from shards.common.locks import Lock
from shards.common.messages import warn
from shards.common.plain_yaml import read_yaml

LOGS = "logs"
"""Folder of the ranks' output, written by launch/."""
_LOCK = "run.lock"
_HOLDER = "run.holder.json"
_MOST_HOLDER_BYTES = 1 << 12
_TRIES, _TRY_SECONDS = 5, 0.05
_WRITTEN = re.compile(
    r"config\.yaml|(metrics|starts)\.jsonl|curves\.png|STOPPED|run\.(holder|saved)\.json|not_finite-step-\d+\.json"
    r"|generator_(ema|best)\.(safetensors|json)|step-\d+\.png"
)
"""Files that only the holder of the lock writes."""


class RunDirectory:
    """Paths of the files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        """The resolved configuration, as YAML."""
        self.metrics = path / "metrics.jsonl"
        """One JSON object per logged step."""
        self.starts = path / "starts.jsonl"
        """One JSON object per start of training."""
        self.samples = path / "samples"
        """Folder of sample grids."""
        self.curves = path / "curves.png"
        """Plot of the metrics."""
        self.checkpoints = path / "checkpoints"
        """Folder of checkpoints."""
        self.generator = path / "generator_ema.safetensors"
        """The averaged generator's weights; a JSON file beside them describes how to rebuild it."""
        self.best = path / "generator_best.safetensors"
        """The averaged generator with the lowest kernel distance so far."""
        self.saved = path / "run.saved.json"
        """The step of the last checkpoint that was finished; it outlives the checkpoints."""
        self.stopped = path / "STOPPED"
        """Marker of a run that a signal stopped before its last step, so that a launcher restarts it."""
        self.folders = (self.checkpoints, self.samples, path / LOGS, path / "wandb")
        """Folders in which training writes; each may be a link of this user's, as to another disk."""


@contextmanager
def claimed(run: RunDirectory, config: Config, resume: str) -> Iterator[None]:
    """Lock the folder for this process, after checking that this configuration may continue in it.

    Raises UserError, and changes nothing, if another process has the lock, if the folder contains other files than a
    run, or a run of another configuration, or any run while `resume` is "never", or links that are not followed.
    """
    require_fitting(run, config, resume)
    with locked(run.path):
        with _errors(run.path):
            for folder in (run.path, run.samples):
                remove_leftovers(folder, _WRITTEN.fullmatch)
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            who = {"host": socket.gethostname(), "pid": os.getpid(), "since": started}
            publish(run.path / _HOLDER, json.dumps(who).encode())
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock the folder of a run, and make it if it does not exist; raises UserError if another process has locked it."""
    with ExitStack() as stack:
        with _errors(path):
            path.mkdir(parents=True, exist_ok=True)
            os.close(open_folder(path))
            if not _taken(stack.enter_context(Lock(path / _LOCK))):
                raise UserError(f"run directory {path} is in use by {_holder(path)}: wait for it, or name another")
        yield


def _taken(lock: Lock) -> bool:
    """Take a lock, also if somebody looks at it just now: `is_locked` holds it for a moment."""
    for _ in range(_TRIES - 1):
        if lock.take():
            return True
        time.sleep(_TRY_SECONDS)
    return lock.take()


def _holder(path: Path) -> str:
    try:
        return read_plain(path / _HOLDER, _MOST_HOLDER_BYTES).decode(errors="replace")
    except OSError:
        return "an unknown process"


def require_fitting(run: RunDirectory, config: Config, resume: str) -> None:
    """Raise UserError if this configuration may not continue in the folder; ignores the lock, changes nothing."""
    _require_safe(run)
    is_run = run.config.is_file()
    if not is_run and run.path.is_dir() and any(_is_content(entry.name) for entry in run.path.iterdir()):
        raise UserError(f"run directory {run.path} holds files but no run: name an empty or new one with --run-dir")
    if is_run and resume == "never":
        raise UserError(f"run directory {run.path} holds a run already: name another with --run-dir, or drop --resume")
    if is_run:
        stored = build(Config, read_yaml(run.config), where=str(run.config))
        _require_equal(f"run directory {run.path} holds a run", stored, config)


def _is_content(name: str) -> bool:
    """Return whether a file is not one that launchers, locks and killed processes leave before a run begins."""
    is_leftover = name != final_name(name) and _WRITTEN.fullmatch(final_name(name))
    return not (name.startswith("run.") or name == LOGS or is_leftover)


def _require_safe(run: RunDirectory) -> None:
    """Raise UserError for a link in the folder by which training would change what is elsewhere.

    The folder may come from somebody else. Files that are replaced as a whole need no check: a link goes, and what it
    leads to stays.
    """
    if os.path.lexists(run.metrics) and (run.metrics.is_symlink() or not run.metrics.is_file()):
        raise UserError(f"{run.metrics}, to which rows are appended, is a link or no plain file: remove it")
    _require_own_links(run.path, *run.folders)
    for folder in run.folders:
        other = RunDirectory(Path(os.path.realpath(folder)).parent)
        if other.path != Path(os.path.realpath(run.path)) and other.config.exists():
            raise UserError(f"{folder} leads into another run, {other.path}: remove the link")


def _require_own_links(*folders: Path) -> None:
    try:
        for folder in folders:
            require_own_folder(folder)
    except ForeignLinkError as error:
        raise UserError(f"{error.filename} is {error.strerror}") from None


def _require_own_logs(run: RunDirectory) -> None:
    """Raise UserError if others could exchange folders below which launchers write, as they follow links.

    Root, and a group to which the user lets the folders be written, are trusted. A folder above, which may be the
    system's and not for the user to change, is only warned of.
    """
    logs = run.path / LOGS
    _require_own_links(run.path, logs)
    for folder in filter(Path.exists, (run.path, logs)):
        status = folder.stat()
        if status.st_uid not in (os.geteuid(), 0):
            raise UserError(
                f"{folder} belongs to another user, who could lead the job's output away: copy the run with "
                "cp -r, and name the copy with --run-dir"
            )
        if status.st_mode & stat.S_IWOTH:
            raise UserError(
                f"{folder} can be written by all users, who could lead the job's output elsewhere: chmod o-w"
            )
    for parent in {parent for folder in (run.path, logs) for parent in Path(os.path.realpath(folder)).parents}:
        if parent.exists() and parent.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            warn(f"{parent} can be written by all users, who could exchange {run.path} there: chmod o-w, or +t")


def is_locked(run: RunDirectory) -> bool:
    """Return whether a process has locked the folder; a lock that cannot be looked at counts as none."""
    path = run.path / _LOCK
    try:
        if not path.is_file():
            return False
        with Lock(path) as lock:
            return not lock.take(shared=True)
    except OSError:
        return False


def may_look_at_lock(run: RunDirectory) -> bool:
    """Return whether this user can tell if the folder is locked: the lock of another user's run only he can open."""
    path = run.path / _LOCK
    return not os.path.lexists(path) or os.access(path, os.R_OK)


def require_unclaimed(run: RunDirectory) -> None:
    """Raise UserError, with the process, if another process has locked the folder; changes nothing."""
    if (run.path / _LOCK).exists():
        with locked(run.path):
            pass


def record(run: RunDirectory, config: Config) -> None:
    """Store the configuration with which the run starts or continues, and remove the marker of a stopped run."""
    with _errors(run.path):
        publish(run.config, to_yaml(config).encode())
        run.stopped.unlink(missing_ok=True)


def record_saved(run: RunDirectory, step: int) -> None:
    """Store the step of a checkpoint that is finished; as the checkpoint is safe, a failure is only a warning."""
    try:
        publish(run.saved, json.dumps({"step": step}).encode())
    except OSError as error:
        warn(f"{run.saved} cannot be written: {error.strerror or error}")


def record_stopped(run: RunDirectory, step: int) -> None:
    """Write the marker of a run that a signal stopped; raises UserError if that fails, as a launcher looks for it."""
    try:
        publish(run.stopped, f"stopped by a signal at step {step}\n".encode())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{run.stopped} cannot be written: {reason}: the same command goes on after step {step}"
        ) from None


def require_new(run: RunDirectory) -> None:
    """Raise UserError if the run, which has no checkpoint now, had one: it is not begun again unasked.

    A run of an older version is known by what follows its last checkpoint: the exported generator, or its marker.
    """
    if any(path.exists() for path in (run.saved, run.generator, run.stopped)):
        raise UserError(
            f"run directory {run.path} has lost its checkpoints: {run.checkpoints} holds none, and the run had saved "
            f"some: put them back, or begin again with another --run-dir"
        )


def require_same_run(
    run: RunDirectory, config: Config, global_batch: int, digest: str, values: Mapping[str, Any]
) -> None:
    """Raise UserError if `values`, of the newest checkpoint, have another data set, global batch or configuration.

    The checkpoint may have been copied from another run.
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


@contextmanager
def foreign_content(run: RunDirectory) -> Iterator[None]:
    """Turn errors of reading what a sound checkpoint holds, which may come from anybody, into UserErrors."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the newest checkpoint in {run.checkpoints} is none of this run: {error!r}: remove it, or name another "
            "with --run-dir"
        ) from None


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk, such as one without locks, into UserErrors with the reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"run directory {path} cannot be used: {error}: name another with --run-dir") from None


def _require_equal(what: str, stored: Config, config: Config) -> None:
    changed = differences(stored, config)
    if stored.batch_per_rank or config.batch_per_rank:  # what they make of it is compared with the checkpoint's
        changed = [line for line in changed if not line.startswith(("global_batch:", "batch_per_rank:"))]
    if changed:
        raise UserError(
            f"{what} of another configuration ({'; '.join(changed)}): use the same, or name another with --run-dir"
        )


def main(argv: Sequence[str]) -> None:
    """Print the run directory of the given flags of training, byte for byte, as launchers use it."""
    makes_logs = argv[:1] == [LOGS]
    run = RunDirectory(from_command_line(argv[makes_logs:])[0].run_dir)
    path = os.fsencode(run.path)
    if min(path) < ord(" "):
        raise UserError(f"run directory {run.path} has a control character in it: name another with --run-dir")
    with _errors(run.path):
        _require_own_logs(run)
        if makes_logs:
            (run.path / LOGS).mkdir(parents=True, exist_ok=True)
            _require_own_logs(run)  # others may have made them since
    sys.stdout.buffer.write(path + b"\n")


if __name__ == "__main__":
    run_command(main)
