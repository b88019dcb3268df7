"""The record of each start of training, a line of JSON: what it takes to repeat it, and how the last start ended."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from dist_dcgan.distributed.launch import launched
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.history import ending
from shards.common.files import publish, read_plain
from shards.common.messages import warn
from shards.common.redaction import one_line

_MOST_BYTES = 1 << 24
"""Thousands of starts."""
_MOST_STARTS = 1000
_GIT_SECONDS = 10


class Start(BaseModel, strict=True):
    """A start of training; the file may come from anybody, and from other versions."""

    time: str
    """UTC, as of ISO 8601."""
    step: int
    """From which it went on; 0: a new run."""
    last: str | None = None
    """How the start before it ended, if there was one."""
    command: str = ""
    """Without secrets."""
    hosts: dict[str, int] = {}
    """Ranks by machine."""
    devices: dict[str, int] = {}
    """Ranks by kind of device."""
    ranks: int = 0
    precision: str = ""
    total_steps: int = 0
    global_batch: int = 0
    data: dict[str, int | str] = {}
    """The data set: name, digest, samples, image_size."""
    scores: dict[str, str] = {}
    """Extractor of scores in training: its name, the SHA-256 of its weights, how it resizes; empty: no scores."""
    versions: dict[str, str] = {}
    commit: str | None = None
    """Of the code, with `-dirty` if files were changed; None: it is not known."""


def how_it_ended(run: RunDirectory) -> str | None:
    """Return how the last start of a run ended, in words, None if there was none; call it before anything is changed.

    The caller holds the run's lock.
    """
    try:
        starts = read_starts(run)
        found = ending(run, starts[-1].total_steps if starts else None)
    except OSError as error:
        return f"not known: {error.strerror or error}"
    if found is None:
        return None
    words = {"stopped": "stopped by a signal", "finished": "finished", "died": "died"}
    return f"{words[found[0]]} after step {found[1]}"


def record_start(run: RunDirectory, start: Start) -> None:
    """Append a line to the record; what fails is a warning."""
    try:
        content = read_plain(run.starts, _MOST_BYTES) if os.path.lexists(run.starts) else b""
        publish(run.starts, content + start.model_dump_json().encode() + b"\n")
    except OSError as error:
        warn(f"{run.starts} lacks this start: {error.strerror or error}")


def read_starts(run: RunDirectory) -> list[Start]:
    """Return the last 1,000 recorded starts of a run; one from before there was a record has none. Raises OSError."""
    starts = []
    for line in (read_plain(run.starts, _MOST_BYTES) if run.starts.is_file() else b"").splitlines()[-_MOST_STARTS:]:
        try:
            starts.append(Start.model_validate_json(line))
        except ValidationError:
            continue
    return starts


def new_start(words: Sequence[str], places: Sequence[Sequence[str]], **facts: Any) -> Start:
    """Return what there is to say about this start.

    `words` are the command's arguments, `places` machine and device of each rank, `facts` the remaining fields.
    """
    return Start(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=one_line(_command(words)),
        hosts=Counter(host for host, _ in places),
        devices=Counter(device for _, device in places),
        ranks=len(places),
        versions=_versions(),
        commit=_commit(Path(__file__).parents[2]),
        **facts,
    )


def place(device: torch.device) -> list[str]:
    """Return the names of this machine and of its device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return [socket.gethostname(), name]


def _command(words: Sequence[str]) -> str:
    launch = launched()
    start = ["python", "-m", "dist_dcgan.train"]
    if launch.by_torchrun:
        nodes = [f"--nnodes={launch.nodes}"] if launch.nodes > 1 else []
        start = ["torchrun", *nodes, f"--nproc_per_node={launch.ranks_of_node}", "-m", "dist_dcgan.train"]
    return shlex.join([*start, *words])


def _versions() -> dict[str, str]:
    found = {"dist_dcgan": version(), "Python": platform.python_version(), "torch": str(torch.__version__)}
    return found | ({"CUDA": torch.version.cuda} if torch.version.cuda and torch.cuda.is_available() else {})


def version() -> str:
    """Return the version of this project."""
    try:
        return metadata.version("dist_dcgan")
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit(root: Path) -> str | None:
    """Return the commit of a checkout of this project; None if the package is not in one, or git does not say."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return one_line(done.stdout.strip())
