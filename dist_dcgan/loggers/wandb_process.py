"""Process beside rank 0 that uploads to Weights & Biases.

It only reads the run directory, so at any time it can be ended and run again from the same position: it does so, to
record offline, if the server does not take the run. A line on its standard input means that the run has ended, the end
of input alone that it was killed. Nothing here imports torch.

It runs in SAFE_DIRECTORY: wandb reads settings from the working directory, such as the server that the key is sent to,
and asks git about the repository there, whose configuration can name commands.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from shards.common.files import MOST_BYTES, disk_space, open_plain, publish, read_plain
from shards.common.redaction import one_line, public_address

UNSENT = "unsent"
"""Marker file in a segment that is not completely uploaded."""
IMPORTING, READY = b"0", b"1"
"""What the process reports on its standard output: that it is about to import wandb, and that it has."""

_INIT_SECONDS = 60.0  # for the server to accept the run, during training
_LAST_INIT_SECONDS = 1.5  # the same, once training has ended
_LOOK_SECONDS = 1.0  # between checks for new rows and pictures
_HEADER_BYTES = 7  # of a .wandb file
_PICTURE = re.compile(r"step-[0-9]{1,18}\.png")


@dataclass(frozen=True)
class Task:
    """What to record, and from which position on."""

    run_dir: str
    run_id: str
    project: str
    name: str
    resume: str
    mode: str
    seconds: float
    """Time to finish, once the run has ended and wandb is imported."""
    offset: int
    """Bytes of metrics.jsonl that an earlier start of the run has recorded."""
    pictures_since: int
    """Modification time, in ns, of the newest picture that an earlier start has recorded."""

    @property
    def client_mode(self) -> str:
        """Mode of the client: without a key, `auto` does not get as far."""
        return "offline" if self.mode == "offline" else "online"

    def command(self) -> list[str]:
        """Return the command that starts the process, which imports from where this one does."""
        folders = [os.path.abspath(folder) for folder in sys.path]
        code = f"import sys; sys.path = {folders}; from dist_dcgan.loggers.wandb_process import main; main()"
        return [sys.executable, "-c", code, json.dumps(asdict(self))]


def holds_rows(file: Path) -> bool:
    """Return whether a .wandb file has more than its header."""
    return file.stat().st_size > _HEADER_BYTES


def without_secrets(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without possible passwords: parts of the data set's address, or its command."""
    return config | {"data": config["data"] | {"path": public_address(str(config["data"]["path"]))}}


class Training:
    """Connection to the training process; the standard streams of other code are redirected to /dev/null."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)  # before wandb puts the address of its wandb-core there
        # Private descriptors, which wandb-core does not inherit and so cannot keep open.
        self._streams = [os.dup(number) for number in range(3)]
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nowhere, number)

    def report(self, state: bytes) -> None:
        """Report IMPORTING or READY."""
        self._write(1, state)

    def warn(self, text: str) -> None:
        """Print one line of warning."""
        self._write(2, f"warning: {one_line(' '.join(text.split()))}\n".encode(errors="backslashreplace"))

    def ended(self, wait: float | None = 0.0) -> bool:
        """Return whether the run has ended, after waiting up to `wait` seconds for it."""
        return bool(select.select([self._streams[0]], [], [], wait)[0])

    def well(self) -> bool:
        """Return whether the run ended normally and was not killed; call it once, after its end."""
        return os.read(self._streams[0], 1) != b""

    def run_again(self, task: Task) -> NoReturn:
        """Replace this process, whatever its threads do, by one that does `task`."""
        self.report(IMPORTING)
        for number, stream in enumerate(self._streams):
            os.dup2(stream, number)
        os.execve(sys.executable, task.command(), self._environment)

    def _write(self, number: int, content: bytes) -> None:
        with contextlib.suppress(OSError):  # the reader is gone
            os.write(self._streams[number], content)


class Feed:
    """Finds new rows and pictures in the run directory."""

    def __init__(self, task: Task) -> None:
        self._task, self._offset, self._pictures = task, task.offset, dict[Path, int]()

    def new(self) -> list[dict[str, Any]]:
        """Return rows, alerts and pictures (`{"step": ..., "picture": path}`) in the order of steps."""
        rows = list(self._new_rows())  # before pictures, so that a picture is never returned after a later row
        return sorted([*rows, *self._new_pictures()], key=lambda found: found["step"])

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        path = Path(self._task.run_dir, "metrics.jsonl")
        if not path.exists():
            return
        with open_plain(path) as file:
            file.seek(self._offset)
            whole = file.read(MOST_BYTES).rpartition(b"\n")[0]
        if whole:
            self._offset += len(whole) + 1
            yield from map(json.loads, whole.splitlines())

    def _new_pictures(self) -> Iterator[dict[str, Any]]:
        for path, changed in picture_times(Path(self._task.run_dir, "samples")).items():
            if changed > self._pictures.get(path, self._task.pictures_since):
                self._pictures[path] = changed
                yield {"step": int(path.stem.removeprefix("step-")), "picture": str(path)}


def picture_times(folder: Path) -> dict[Path, int]:
    """Return the sample grids in a folder and their modification times in ns, of no link and no other name."""
    found = {path: path.lstat() for path in folder.glob("step-*.png") if _PICTURE.fullmatch(path.name)}
    return {path: status.st_mtime_ns for path, status in found.items() if stat.S_ISREG(status.st_mode)}


class Recorder:
    """Records the run, in the main thread; another thread ends what does not end in time."""

    def __init__(self, task: Task, training: Training, wandb: Any) -> None:
        self._task, self._training, self._wandb = task, training, wandb
        self._lock, self._waits_for_server = threading.Lock(), task.mode != "offline"
        self._deadline = float("inf")

    def run(self) -> None:
        """Record until the run ends."""
        try:
            if self._task.mode == "auto" and not self._wandb.login(prompt=False, verify=False):
                return  # no key, nothing to do
            threading.Thread(target=self._watch, daemon=True).start()
            self._record()
        except BaseException as error:  # wandb's and network errors; some are SystemExit
            if self._waits_for_server:
                self._wandb.teardown()  # ends wandb-core, which would go on asking; the other thread limits its time
                self._record_offline(f"W&B does not take the run, which is recorded in its directory: {error!r}")
            self._training.warn(f"W&B is turned off: {error!r}")

    def _watch(self) -> None:
        self._training.ended(wait=None)
        self._deadline = time.monotonic() + self._task.seconds
        time.sleep(_LAST_INIT_SECONDS)
        self._record_offline("W&B's server does not answer: the run is recorded in the run directory")
        time.sleep(max(self._deadline - time.monotonic(), 0))
        self._training.warn("W&B did not finish in time")
        os._exit(0)

    def _record_offline(self, reason: str) -> None:
        """Run again, offline, in the time that is left, if the server has not taken the run."""
        with self._lock:
            if self._waits_for_server:
                self._training.warn(reason)
                seconds = min(self._task.seconds, self._deadline - time.monotonic())
                self._training.run_again(replace(self._task, mode="offline", seconds=seconds))

    def _record(self) -> None:
        wandb = self._wandb
        run = wandb.init(**self._arguments())
        with self._lock:
            self._waits_for_server = False
        unsent = Path(run.dir).parent / UNSENT
        if self._task.mode != "offline":
            publish(unsent, b"")
        wandb.define_metric("*", step_metric="step")  # else steps before the last logged one are dropped after a resume
        feed, ended = Feed(self._task), False
        while not ended:
            ended = self._training.ended(wait=_LOOK_SECONDS)
            for found in feed.new():
                self._log(found)
        try:
            wandb.finish(exit_code=0 if self._training.well() else 1)
        finally:
            wandb.teardown()  # waits until the file is written
        _require_written(unsent.parent)
        unsent.unlink(missing_ok=True)

    def _log(self, found: dict[str, Any]) -> None:
        wandb, step = self._wandb, found["step"]
        if "alert" in found:
            wandb.alert(title=f"Step {step}: {found['alert'].splitlines()[0]}"[:64], text=found["alert"])
        elif "picture" in found:
            wandb.log({"step": step, "samples": wandb.Image(found["picture"])})
        else:
            wandb.log({key: float("nan") if value is None else value for key, value in found.items()})

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of wandb.init: no code, no console and no command line is recorded."""
        task, config = self._task, yaml.safe_load(read_plain(Path(self._task.run_dir, "config.yaml")))
        options: dict[str, Any] = {
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": max(task.seconds - 1, 0.1),
            "finish_timeout_raises": True,
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "console": "off",
            "use_dot_wandb": False,
        }
        if "x_stats_pid" in getattr(self._wandb.Settings, "model_fields", {}):
            options["x_stats_pid"] = os.getppid()  # show training's memory and GPU, not this process's
        return {
            "project": task.project,
            "name": task.name,
            "id": task.run_id,
            "resume": task.resume,
            "mode": task.client_mode,
            "dir": task.run_dir,
            "config": without_secrets(config),
            "settings": self._wandb.Settings(**options),
        }


def _require_written(segment: Path) -> None:
    """Raise OSError if the disk is full, which wandb does not report."""
    space = disk_space(segment)
    if (space is not None and space.free == 0) or not any(map(holds_rows, segment.glob("*.wandb"))):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(segment))


def prepare_environment(task: Task) -> None:
    """Make W&B's variables agree with the task: in sweeps, launches and SageMaker they win over wandb.init's arguments.

    A variable that is set but empty is an error to wandb. WANDB_SERVICE is the address of another process's wandb-core.
    """
    tags = os.environ.get("WANDB_TAGS", "").split(",")
    os.environ["WANDB_TAGS"] = ",".join(filter(None, tags))
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]
    for name in ("WANDB_SERVICE", "WANDB_RESUME"):
        os.environ.pop(name, None)
    if {"SM_TRAINING_ENV", "TRAINING_JOB_NAME"} <= os.environ.keys():  # wandb does so only without WANDB_RUN_ID
        os.environ.setdefault("WANDB_RUN_GROUP", os.environ["TRAINING_JOB_NAME"])
    os.environ["WANDB_MODE"] = task.client_mode
    os.environ["WANDB_PROJECT"], os.environ["WANDB_RUN_ID"] = task.project, task.run_id
    os.environ["WANDB_SILENT"] = "true"  # else it asks the server for the user's name, to print it


def main() -> None:
    """Record a run until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # training handles them and then ends this process
    task, training = Task(**json.loads(sys.argv.pop())), Training()  # pop: wandb records the arguments
    prepare_environment(task)
    try:
        import wandb

        with contextlib.suppress(ImportError):
            import wandb.apis.public  # wandb.init imports it
    except BaseException as error:  # no error of wandb may affect training
        training.warn(f"W&B is turned off: it cannot be imported: {error!r}")
    else:
        training.report(READY)
        Recorder(task, training, wandb).run()
    os._exit(0)  # without exit hooks: wandb's would wait for the network
