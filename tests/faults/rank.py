"""Training as one rank that something happens to: python -m tests.faults.rank, in the place of dist_dcgan.train.

FAULTS, JSON, says what happens where: each fault happens once in the life of a run, whatever is started again.
FAULT_LOG names the folder that remembers it, and where every rank writes which samples each of its steps used, and
when, and the digest of what it holds whenever a checkpoint is due.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import select
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

PLACES = ("import", "start", "before step", "D step", "G step", "save", "evaluation")
"""Where something happens. A step is one of training; for "import" and "start", the step is 0."""


@dataclass(frozen=True)
class Fault:
    """What happens to one rank."""

    act: str
    """A key of ACTS."""
    place: str
    """One of PLACES."""
    step: int
    """The step in which it happens, counted from 1."""
    rank: int = 1

    def __str__(self) -> str:
        where = self.place if self.step == 0 else f"{self.place} {self.step}"
        return f"{self.act}, rank {self.rank}, {where}"


def to_environment(faults: list[Fault], log: Path) -> dict[str, str]:
    """Return the variables that a rank reads."""
    return {"FAULTS": json.dumps([asdict(fault) for fault in faults]), "FAULT_LOG": str(log)}


class Injector:
    """Makes the faults of this rank happen, each once."""

    def __init__(self) -> None:
        self._rank, self._log = int(os.environ.get("RANK", "0")), Path(os.environ["FAULT_LOG"])
        faults = [Fault(**fault) for fault in json.loads(os.environ["FAULTS"])]
        self._faults = {index: fault for index, fault in enumerate(faults) if fault.rank == self._rank}
        self.step = 0

    def used(self, step: int, samples: list[int]) -> None:
        """Note the samples of a step, counted from 1, which begins."""
        self.step = step
        self._note("samples", {"step": step, "time": time.time(), "pid": os.getpid(), "samples": samples})

    def holds(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Note the digest of everything that this rank has after a step, and all should have."""
        shared = {
            name: tensor for name, tensor in tensors.items() if not re.match(r"generator_ema.*(running|tracked)", name)
        }
        digest = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in shared.values()))
        self._note("holds", {"step": step, "sha256": digest.hexdigest()})

    def _note(self, name: str, row: Mapping[str, object]) -> None:
        with (self._log / f"{name}-{self._rank}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def reach(self, place: str, step: int | None = None) -> None:
        """Have happen the next of what is to happen here."""
        step = self.step if step is None else step
        for index, fault in self._faults.items():
            if (fault.place, fault.step) == (place, step) and self._is_first(index):
                return ACTS[fault.act]()

    def _is_first(self, index: int) -> bool:
        try:
            with (self._log / f"fault-{index:03d}").open("x") as file:
                file.write(repr(time.time()))
        except FileExistsError:
            return False
        return True


def _peers() -> list[int]:
    agent = os.getppid()
    return [int(child) for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def _kill_tree() -> None:
    agent, mine = os.getppid(), os.getpid()
    for pid in [agent, *(pid for pid in _peers() if pid != mine), mine]:
        os.kill(pid, signal.SIGKILL)


def _lose_output(descriptor: int) -> None:
    """Have this rank's standard output and error go to another file from now on."""
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _reader_exits() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    _lose_output(writer)


def _reader_stops() -> None:
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(select.PIPE_BUF))
    except BlockingIOError:
        os.set_blocking(writer, True)
    _lose_output(writer)


def _terminal_closes() -> None:
    terminal, stream = os.openpty()
    os.close(terminal)
    _lose_output(stream)


def _hang_torchrun() -> None:
    """Have torchrun hang, and all of its ranks die."""
    os.kill(os.getppid(), signal.SIGSTOP)
    for pid in [*(pid for pid in _peers() if pid != os.getpid()), os.getpid()]:
        if b"tests.faults.rank" in Path(f"/proc/{pid}/cmdline").read_bytes():  # not the launcher's watch
            os.kill(pid, signal.SIGKILL)


def cut_short(file: Path) -> None:
    """Leave the first half of a file."""
    os.truncate(file, file.stat().st_size // 2)


def _damage_newest() -> None:
    """Cut the newest checkpoint short, and die."""
    run_dir = Path(os.environ["FAULT_LOG"]) / "run"
    cut_short(max((run_dir / "checkpoints").glob("step-" + "[0-9]" * 8)) / "tensors.safetensors")
    os.kill(os.getpid(), signal.SIGKILL)


def _fail() -> None:
    raise ValueError("an injected mistake")


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _nan_gradient() -> None:
    """Have the next gradient of D's first layer be NaN on this rank."""
    parameter = next(NETWORKS["discriminator"].parameters())

    def poison(gradient: Any) -> Any:
        handle.remove()
        return gradient * math.nan

    handle = parameter.register_hook(poison)


def _hold() -> None:
    """Wait for a signal to stop, or for death: something is going to happen from without."""
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    came = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, note)
    while not came:
        time.sleep(0.1)


NETWORKS: dict[str, Any] = {}

ACTS: dict[str, Callable[[], None]] = {
    "kill -9 of a rank": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill -9 of torchrun": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "kill -9 of all": _kill_tree,
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "SIGTERM to a rank": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1 to a rank": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGTERM to torchrun": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "SIGUSR1 to torchrun": lambda: os.kill(os.getppid(), signal.SIGUSR1),
    "SIGSTOP of torchrun, kill -9 of ranks": _hang_torchrun,
    "exception": _fail,
    "wait": lambda: time.sleep(2),
    "hold": _hold,
    "disk full": _disk_full,
    "checkpoint cut short, kill -9": _damage_newest,
    "NaN gradient": _nan_gradient,
    "the reader of the output exits": _reader_exits,
    "the reader of the output stops": _reader_stops,
    "the terminal of the output closes": _terminal_closes,
    "the disk of the output is full": lambda: _lose_output(os.open("/dev/full", os.O_WRONLY)),
}


def main() -> None:
    """Train."""
    injector = Injector()
    injector.reach("import", 0)
    from dist_dcgan import train
    from dist_dcgan.distributed.world import run_rank
    from dist_dcgan.run import checkpoint
    from dist_dcgan.training import loop, quality, steps

    def begin_step(batch: Any, dtype: object) -> None:
        injector.used(batch.step + 1, batch.samples.tolist())
        injector.reach("before step")

    def update_discriminator(state: Any, *_: object, **__: object) -> None:
        NETWORKS["discriminator"] = state.discriminator
        injector.reach("D step")

    def save(state: Any, *_: object) -> None:
        injector.holds(state.step, state.tensors())

    def publish(path: Path, content: bytes) -> None:
        if path.name == checkpoint._VALUES:
            injector.reach("save", int(path.parent.name.removeprefix("step-").partition(".")[0]))

    first_do(begin_step, loop, "to_images")
    first_do(save, loop, "save")
    first_do(lambda *_: injector.reach("start", 0), loop, "process_group")
    first_do(update_discriminator, steps, "discriminator_step")
    first_do(lambda *_, **__: injector.reach("G step"), steps, "generator_step")
    first_do(lambda *_, **__: injector.reach("evaluation"), quality, "extract")
    first_do(publish, checkpoint, "publish")
    run_rank(train.main)


def first_do(action: Callable[..., None], module: ModuleType, name: str) -> None:
    """Have a function of a module do something first, with the same arguments, from now on."""
    function = getattr(module, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        action(*arguments, **options)
        return function(*arguments, **options)

    mock.patch.object(module, name, wrapped).start()


if __name__ == "__main__":
    main()
