"""How ranks meet, and what became of the others if a collective breaks: who failed and why, ended, or hangs.

The ranks keep boards in the store through which they met; under torchrun it lives in the agent, so that it outlives
each of them.

Who is blamed: ranks that report an error of their own; else those whose process has ended, or stopped (nothing in it
answers for some seconds, so it is killed if it runs on this machine); else, and without being killed, those that answer
but have not come to the end of the collective. These are busy, hang in a loop, or wait inside CUDA for one that does:
it cannot be told from outside, so the line of Python at which each stands is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from shards.common.errors import OneRankError

_SECONDS_TO_ASK = 2.0
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_BETWEEN_LOOKS_A_RANK = 0.001  # all of them ask one store
_MOST_SHOWN = 5


class RankProcess(NamedTuple):
    """Where a rank runs, and what it has."""

    host: str
    pid: int
    machine: str
    """Equal for processes that see each other's `pid`: containers may share the name of a host."""
    local_rank: int
    gpus: int
    """Number of GPUs that its host shows to it."""


def rendezvous(store: Any, rank: int, world_size: int, patience_seconds: float) -> Any:
    """Return the part of `store` that belongs to this start of the ranks alone, when all have come.

    Torchrun keeps one store while it starts ranks again, so that they would find the addresses of those before them
    (torch 2.14: "Connection refused"). Its count of restarts does not tell starts apart, as a node that is replaced
    counts anew. So rank 0 numbers the starts, and answers each peer by a word that only that process can have said.
    Raises OneRankError with the ranks that do not come in time.
    """
    if rank != 0:
        word = secrets.token_hex(8)
        store.set(f"hello {rank}", word)
        store.wait([f"start for {word}"], timedelta(seconds=patience_seconds))
        room = dist.PrefixStore(f"start {store.get(f'start for {word}').decode()}", store)  # type: ignore[attr-defined]
        room.set(f"here {rank}", "")
        return room
    number = store.add("starts", 1)
    room = dist.PrefixStore(f"start {number}", store)  # type: ignore[attr-defined]
    deadline, missing = time.monotonic() + patience_seconds, list(range(1, world_size))
    while missing:
        for peer in missing:
            if store.check([f"hello {peer}"]):
                store.set(f"start for {store.get(f'hello {peer}').decode()}", str(number))
        missing = [peer for peer in missing if not room.check([f"here {peer}"])]
        if missing and time.monotonic() > deadline:
            raise OneRankError(f"rank 0 waits in vain for ranks {missing}: they have not started")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return room


class Peers:
    """The boards of one process group: where each rank is, and which ranks failed, ask, answer, or left."""

    def __init__(self, store: Any, rank: int, world_size: int, local_rank: int = 0, gpus: int = 0) -> None:
        """Enter this rank; `store` is one of torch.distributed."""
        self._store, self.rank, self.world_size = store, rank, world_size
        self._reported = False
        self._answered = False
        self._neighbours: dict[int, RankProcess] = {}
        self._write("processes", RankProcess(socket.gethostname(), os.getpid(), _machine(), local_rank, gpus))

    def everyone(self, patience_seconds: float) -> dict[int, RankProcess]:
        """Return the processes of all ranks by rank, when all have entered; each rank calls it once.

        Raises torch's DistError if they do not in `patience_seconds`.
        """
        if self._store.add("entered", 1) == self.world_size:
            self._store.set("all entered", "")
        self._store.wait(["all entered"], timedelta(seconds=patience_seconds))
        processes = self._processes()
        self._neighbours = {rank: process for rank, process in processes.items() if _is_here(process)}
        return processes

    def report(self, why: str) -> None:
        """Say that this rank fails by itself, and why."""
        self._reported = True
        self._ask(lambda: self._write("ends", why))

    def leave(self) -> None:
        """Say that this rank ends in the normal way, so that its end is no failure to those that still run."""
        self._ask(lambda: self._write("leaves", None))

    def explain(self) -> str:
        """Return what ended the collective that broke on this rank; called in the main thread.

        From now on SIGTERM is ignored: torchrun sends it as soon as one rank has ended, and this one is to say why.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return self.cause()

    def cause(self) -> str:
        """Return what keeps this rank from going on.

        A rank of this machine that does not answer is killed, so that torchrun need not wait for it. Takes some seconds
        at most, whatever state the others are in.
        """
        reached, found = threading.Event(), []

        def look() -> None:
            if not self._reported:
                self._write("ends", None)
            self._read("ends")  # writing waits for no answer
            reached.set()
            found.extend(self._explain())

        self._ask(look)
        if not reached.is_set():
            return f"{os.environ.get('MASTER_ADDR', 'the machine')}, where the ranks meet, cannot be reached"
        return "; ".join(found) or "a collective took too long, or a connection broke"

    def broken(self) -> bool:
        """Return whether a rank has failed or asks what failed, or one of this machine has ended without leaving.

        The watch of each rank calls it again and again: it costs one question to the store. If a rank asks, this one
        answers, whatever its main thread waits for. Raises RuntimeError if the store is gone.
        """
        if not self._store.check(["ends"]):
            return self._neighbour_ended()
        if not self._answered:
            self._answered = True
            self._write("answers", _main_threads_line())
        return True

    def _neighbour_ended(self) -> bool:
        ended = {rank for rank, process in self._neighbours.items() if _has_ended(process)}
        return bool(ended - self._read("leaves").keys()) if ended else False

    def _explain(self) -> list[str]:
        deadline = time.monotonic() + _SECONDS_TO_ASK
        while True:
            ends = self._read("ends")
            processes = self._processes()  # after the ends: a rank that has ended had entered before
            reasons = {rank: why for rank, why in ends.items() if why is not None}
            if reasons:
                return [f"{_name(rank, processes[rank])} failed: {why}" for rank, why in reasons.items()]
            silent = [rank for rank in range(self.world_size) if rank not in ends]
            if time.monotonic() > deadline or all(rank in processes and _has_ended(processes[rank]) for rank in silent):
                return self._fates(silent, processes)
            time.sleep(max(_SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS_A_RANK * self.world_size))

    def _fates(self, silent: list[int], processes: dict[int, RankProcess]) -> list[str]:
        """Return what became of the ranks that have not come; those that answer count only if there are no others."""
        answers = self._read("answers")
        lost = [
            _fate(rank, processes[rank]) if rank in processes else f"rank {rank} has not come"
            for rank in silent
            if rank not in answers or _has_ended(processes[rank])
        ]
        if lost or not silent:
            return lost
        shown = [f"{_name(rank, processes[rank])} is busy or waits {answers[rank]}" for rank in silent[:_MOST_SHOWN]]
        return shown + ([f"{len(silent) - _MOST_SHOWN} more do"] if len(silent) > _MOST_SHOWN else [])

    def _write(self, board: str, content: Any) -> None:
        self._store.append(board, json.dumps([self.rank, content]) + "\n")

    def _read(self, board: str) -> dict[int, Any]:
        """Return what each rank has written, of those that have."""
        if not self._store.check([board]):
            return {}
        return dict(json.loads(line) for line in self._store.get(board).decode().splitlines())

    def _processes(self) -> dict[int, RankProcess]:
        return {rank: RankProcess(*process) for rank, process in self._read("processes").items()}

    def _ask(self, question: Callable[[], object]) -> None:
        """Ask the store, which may be gone or cut off, in a thread that need not come back."""

        def ask() -> None:
            with suppress(RuntimeError):  # the store went with its host
                question()

        thread = threading.Thread(target=ask, name="peers", daemon=True)
        thread.start()
        thread.join(2 * _SECONDS_TO_ASK)


def _machine() -> str:
    """Return what tells machines apart, and containers on one that do not see each other's processes."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        seen = f"{socket.gethostname()} {started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: processes that have ended cannot be told from others
        return ""
    return hashlib.sha256(seen.encode()).hexdigest()[:12]  # all ranks read it of all


def _main_threads_line() -> str:
    """Return at which line of Python the main thread of this process is."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "at its end"
    return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _name(rank: int, process: RankProcess) -> str:
    return f"rank {rank} on {process.host} (process {process.pid})"


def _is_here(process: RankProcess) -> bool:
    return process.machine != "" and process.machine == _machine()


def _has_ended(process: RankProcess) -> bool:
    """Return whether a process is known to have ended."""
    return _is_here(process) and not _alive(process.pid)


def _fate(rank: int, process: RankProcess) -> str:
    """Return what became of a rank that says nothing; it is killed if it can be."""
    if _has_ended(process):
        return f"{_name(rank, process)} has ended"
    if not _is_here(process):
        return f"{_name(rank, process)} does not answer"
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(process.pid, signal.SIGKILL)
    return f"{_name(rank, process)} does not answer and is killed"


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(pid), "status").read_text()
    except OSError:
        return False
