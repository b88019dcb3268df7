"""Process beside rank 0 that uploads to Weights & Biases: `python -m dist_dcgan.loggers.wandb_process`.

Its standard input holds a line of JSON that says what to record; another line followed by the end of input means that
the run has ended, the end of input alone that it was killed. The data are read from the run directory.

wandb is imported once; a fork then connects to the server. If the fork hangs, it is killed after a timeout, and another
fork records offline into the run directory, from the start. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

UNSENT = "unsent"
"""Marker file in a segment that is not completely uploaded."""

_INIT_SECONDS = 60.0  # for the server to accept the run, during training
_LAST_INIT_SECONDS = 1.5  # the same, once training has ended
_FINISH_SECONDS = 3.5
_LOOK_SECONDS = 1.0  # between checks for new rows and pictures

_HEADER_BYTES = 7  # of a .wandb file

_DONE, _FAILED, _NO_SERVER = range(3)  # exit status of the fork
_START, _HAS_KEY, _RECORDS = b"0", b"1", b"2"  # progress of the fork


def holds_rows(file: Path) -> bool:
    """Return whether a .wandb file has more than its header."""
    return file.stat().st_size > _HEADER_BYTES


def close_seconds(mode: str) -> float:
    """Return the seconds within which the process ends, once the run has ended and wandb is imported.

    A network that hangs must not delay the end of a run; offline, writing to disk takes longer but finishes.
    """
    return 30.0 if mode == "offline" else 5.0


@dataclass(frozen=True)
class Order:
    """What to record."""

    run_dir: str
    run_id: str
    mode: str
    project: str
    name: str
    config: dict[str, Any]
    offset: int
    """Bytes of metrics.jsonl that an earlier start of the run has recorded."""
    pictures: dict[str, int]
    """Modification times, in ns, of pictures that are not new."""
    pid: int
    """The training process, whose CPU and GPU use is recorded."""


class Training:
    """Connection to the training process; the standard streams of other code are redirected to /dev/null."""

    def __init__(self) -> None:
        # Private descriptors, which wandb-core does not inherit and so cannot keep open.
        self._orders, self._reports, self._errors = (os.dup(number) for number in range(3))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nowhere, number)
        self._ended_at: float | None = None

    def order(self) -> Order:
        """Read what to record."""
        line = b""
        while not line.endswith(b"\n"):  # byte by byte: the rest of the input says how the run ended
            byte = os.read(self._orders, 1)
            if not byte:
                raise SystemExit(0)  # training was killed at its start
            line += byte
        return Order(**json.loads(line))

    def tell_imported(self) -> None:
        """Report that wandb is imported."""
        _write(self._reports, "imported\n")

    def warn(self, text: str) -> None:
        """Print one line of warning, with the API key masked."""
        key = os.environ.get("WANDB_API_KEY")
        line = " ".join((text.replace(key, "***") if key else text).split())
        _write(self._errors, f"warning: {line}\n")

    def ended(self, wait: float = 0.0) -> bool:
        """Return whether the run has ended, after waiting up to `wait` seconds for it."""
        if select.select([self._orders], [], [], wait)[0] and self._ended_at is None:
            self._ended_at = time.monotonic()
        return self._ended_at is not None

    def seconds_since_end(self) -> float:
        """Return the seconds since `ended` was first true."""
        return 0.0 if self._ended_at is None else time.monotonic() - self._ended_at

    def well(self) -> bool:
        """Return whether the run ended normally and was not killed; call it once, after its end."""
        return os.read(self._orders, 1) != b""


@dataclass
class Feed:
    """Finds new rows and pictures in the run directory."""

    order: Order
    _offset: int = field(init=False)
    _pictures: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._offset, self._pictures = self.order.offset, dict(self.order.pictures)

    def new(self) -> list[dict[str, Any]]:
        """Return rows, alerts and pictures (`{"step": ..., "picture": path}`) in the order of steps."""
        rows = list(self._new_rows())  # before pictures, so that a picture is never returned after a later row
        return sorted([*rows, *self._new_pictures()], key=lambda found: found["step"])

    def _new_rows(self) -> Iterator[dict[str, Any]]:
        path = Path(self.order.run_dir, "metrics.jsonl")
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        if whole:
            self._offset += len(whole) + 1
            yield from map(json.loads, whole.splitlines())

    def _new_pictures(self) -> Iterator[dict[str, Any]]:
        for path in Path(self.order.run_dir, "samples").glob("step-*.png"):
            changed = path.stat().st_mtime_ns
            if self._pictures.get(path.name) != changed:
                self._pictures[path.name] = changed
                yield {"step": int(path.stem.removeprefix("step-")), "picture": str(path)}


def main() -> None:
    """Record a run until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # training handles them and then ends this process
    training = Training()
    order = training.order()
    os.environ["WANDB_SILENT"] = "true"  # else it asks the server for the user's name, to print it
    try:
        import wandb

        with contextlib.suppress(ImportError):
            import wandb.apis.public  # wandb.init imports it, in each fork
    except BaseException as error:  # no error of wandb may affect training
        training.warn(f"W&B is turned off: it cannot be imported: {error!r}")
        return
    training.tell_imported()
    if order.mode == "offline" or Attempt(training, order, wandb, "online").run() == _NO_SERVER:
        Attempt(training, order, wandb, "offline").run()


class Attempt:
    """A fork that records the run, with its time limits."""

    def __init__(self, training: Training, order: Order, wandb: Any, mode: str) -> None:
        self._training, self._order, self._wandb, self._mode = training, order, wandb, mode
        self._limit = close_seconds(order.mode) - 0.5
        self._progress, self._tell = os.pipe()
        os.set_blocking(self._progress, False)
        self._reached = _START

    def run(self) -> int:
        """Return the exit status; _NO_SERVER if nothing was recorded and another mode may be tried."""
        started = time.monotonic()
        fork = os.fork()
        if fork == 0:
            self._record_and_exit()
        while True:
            done, status = os.waitpid(fork, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            failure = self._too_slow(time.monotonic() - started)
            if failure is not None:
                os.kill(fork, signal.SIGKILL)
                os.waitpid(fork, 0)
                return failure
            time.sleep(0.05)

    def _too_slow(self, seconds: float) -> int | None:
        """Return the exit status if a time limit has passed after `seconds`, else None."""
        training = self._training
        if training.ended() and training.seconds_since_end() > self._limit:
            training.warn("W&B did not finish in time")
            return _FAILED
        with contextlib.suppress(BlockingIOError):
            self._reached = os.read(self._progress, 10)[-1:]
        waiting = self._mode == "online" and self._reached == _HAS_KEY
        if waiting and (seconds > _INIT_SECONDS or training.seconds_since_end() > _LAST_INIT_SECONDS):
            training.warn("W&B's server does not answer: the run is recorded in the run directory")
            return _NO_SERVER
        return None

    def _record_and_exit(self) -> NoReturn:
        """Record, in the fork, and exit without exit hooks: wandb's would wait for the network."""
        status = _FAILED
        try:
            status = self._record()
        except BaseException as error:  # wandb's and network errors; some are SystemExit
            if self._reached == _RECORDS or self._mode == "offline":
                self._training.warn(f"W&B is turned off: {error!r}")
            else:
                self._training.warn(f"W&B does not take the run, which is recorded in its directory: {error!r}")
                status = _NO_SERVER
        finally:
            os._exit(status)

    def _record(self) -> int:
        wandb = self._wandb
        if self._order.mode == "auto" and self._mode == "online" and not wandb.login(prompt=False, verify=False):
            return _DONE  # no key, nothing to do
        self._reach(_HAS_KEY)
        run = wandb.init(**self._arguments())
        self._reach(_RECORDS)
        unsent = Path(run.dir).parent / UNSENT
        if self._mode == "online":
            unsent.touch()
        wandb.define_metric("*", step_metric="step")  # else steps before the last logged one are dropped after a resume
        feed, ended = Feed(self._order), False
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
        return _DONE

    def _reach(self, state: bytes) -> None:
        self._reached = state
        os.write(self._tell, state)

    def _log(self, found: dict[str, Any]) -> None:
        wandb, step = self._wandb, found["step"]
        if "alert" in found:
            wandb.alert(title=f"Step {step}: {found['alert'].splitlines()[0]}"[:64], text=found["alert"])
        elif "picture" in found:
            wandb.log({"step": step, "samples": wandb.Image(found["picture"])})
        else:
            wandb.log({key: float("nan") if value is None else value for key, value in found.items()})

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of wandb.init: no code and no console is recorded."""
        order, wandb = self._order, self._wandb
        options: dict[str, Any] = {
            "init_timeout": _INIT_SECONDS,
            "finish_timeout": _FINISH_SECONDS if self._mode == "online" else close_seconds("offline"),
            "finish_timeout_raises": True,
            "silent": True,
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "console": "off",
        }
        if "x_stats_pid" in getattr(wandb.Settings, "model_fields", {}):
            options["x_stats_pid"] = order.pid  # show training's memory and GPU, not this process's
        return {
            "project": order.project,
            "name": order.name,
            "id": order.run_id,
            "resume": "allow",
            "mode": self._mode,
            "dir": order.run_dir,
            "config": order.config,
            "settings": wandb.Settings(**options),
        }


def _require_written(segment: Path) -> None:
    """Raise OSError if the disk is full, which wandb does not report."""
    if shutil.disk_usage(segment).free == 0 or not any(map(holds_rows, segment.glob("*.wandb"))):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(segment))


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):  # the reader is gone
        os.write(descriptor, text.encode())


if __name__ == "__main__":
    main()
