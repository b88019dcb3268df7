"""Rendezvous of the ranks, and the diagnosis of a broken collective: which rank failed and why, ended, or hangs.

Ranks exchange reports through the rendezvous store; under torchrun it is part of the agent and outlives each rank.

The diagnosis names ranks that report an error of their own; else those whose process has ended or does not answer for
some seconds (it is killed if it runs on this machine); else, without killing them, those that answer but have not
reported the broken collective. The latter are busy, hang in a loop, or wait inside CUDA for such a rank; as this cannot
be distinguished from outside, the message has the line of Python that each executes.
"""

from __future__ import annotations

import hashlib
import hmac
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
_SECONDS_BETWEEN_LOOKS_A_RANK = 0.001  # all query one store
_MOST_SHOWN = 5


class RankProcess(NamedTuple):
    """Process of a rank: its host, and the GPUs visible to it."""

    host: str
    pid: int
    started: str
    """When the process started, as Linux tells; with `pid` it identifies the process."""
    machine: str
    """Equal for processes that see each other's `pid`; containers may share a host name."""
    local_rank: int
    gpus: int
    """Number of GPUs that are visible to it."""
    promised: str
    """What CUDA_VISIBLE_DEVICES names; empty for no GPU."""


def rendezvous(store: Any, rank: int, world_size: int, timeout_seconds: float) -> Any:
    """Wait until all ranks have joined; return a prefix of `store` that only this start of the ranks uses.

    Torchrun keeps one store across restarts, so that ranks would read the addresses of the previous start (torch 2.14:
    "Connection refused"). Its count of restarts is not unique, as a replaced node begins at 0 again. So rank 0 numbers
    the starts, and echoes each peer's random token. Raises OneRankError with the ranks that do not join in time.
    """
    if rank != 0:
        token = secrets.token_hex(8)
        store.set(f"hello {rank}", token)
        store.wait([f"start for {token}"], timedelta(seconds=timeout_seconds))
        room = dist.PrefixStore(f"start {store.get(f'start for {token}').decode()}", store)  # type: ignore[attr-defined]
        room.set(f"here {rank}", "")
        return room
    number = store.add("starts", 1)
    room = dist.PrefixStore(f"start {number}", store)  # type: ignore[attr-defined]
    deadline, missing = time.monotonic() + timeout_seconds, list(range(1, world_size))
    while missing:
        for peer in missing:
            if store.check([f"hello {peer}"]):
                store.set(f"start for {store.get(f'hello {peer}').decode()}", str(number))
        missing = [peer for peer in missing if not room.check([f"here {peer}"])]
        if missing and time.monotonic() > deadline:
            raise OneRankError(f"rank 0 has waited for ranks {missing}, which have not started")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return room


class Peers:
    """Reports of the ranks of one process group: their processes, and which failed, ask, answer, or left."""

    def __init__(
        self, store: Any, rank: int, world_size: int, local_rank: int = 0, gpus: int = 0, key: bytes | None = b""
    ) -> None:
        """Report this rank's process; `store` is one of torch.distributed.

        Reports that are not authenticated with `key` are ignored. None: strangers may write to the store, so no process
        is killed for what is read there.
        """
        self._store, self.rank, self.world_size = store, rank, world_size
        self._key, self._trusted = key or b"", key is not None
        self._reported = False
        self._answered = False
        self._neighbours: dict[int, RankProcess] = {}
        self._write("processes", this_process(local_rank, gpus))

    def everyone(self, timeout_seconds: float) -> dict[int, RankProcess]:
        """Wait for all ranks; return their processes by rank. Each rank calls it once.

        Raises torch's DistError after `timeout_seconds`. Rank 0 waits until all have read: its process may hold the
        store, and end with an error that follows from what it read.
        """
        timeout = timedelta(seconds=timeout_seconds)
        if self._store.add("entered", 1) == self.world_size:
            self._store.set("all entered", "")
        self._store.wait(["all entered"], timeout)
        processes = self._processes()
        if self._store.add("read", 1) == self.world_size:
            self._store.set("all read", "")
        if self.rank == 0:
            self._store.wait(["all read"], timeout)
        self._neighbours = {rank: process for rank, process in processes.items() if _is_here(process)}
        return processes

    def report(self, why: str) -> None:
        """Report that this rank fails with an error of its own, and why."""
        self._reported = True
        self._ask(lambda: self._write("ends", why))

    def leave(self) -> None:
        """Report that this rank ends normally, so that its peers do not take its end for a failure."""
        self._ask(lambda: self._write("leaves", None))

    def cause(self) -> str:
        """Return why this rank cannot continue; takes some seconds at most.

        A rank of this machine that does not answer is killed, so that torchrun need not wait for it.
        """
        reached, found = threading.Event(), []

        def look() -> None:
            if not self._reported:
                self._write("ends", None)
            self._read("ends")  # waits for the store's answer, unlike writing
            reached.set()
            found.extend(self._explain())

        self._ask(look)
        if not reached.is_set():
            return f"{os.environ.get('MASTER_ADDR', 'the machine')}, where the ranks meet, cannot be reached"
        return "; ".join(found) or "a collective took too long, or a connection broke"

    def broken(self) -> bool:
        """Return whether a rank has failed or asks what failed, or one of this machine has ended without `leave`.

        Each rank's watch polls it, at one query of the store. If a rank asks, this one answers, even if its main thread
        is blocked. Raises RuntimeError if the store is gone.
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
            processes = self._processes()  # read after `ends`, so that every rank in `ends` is found
            reasons = {rank: why for rank, why in ends.items() if why is not None}
            if reasons:
                return [f"{_name(rank, processes[rank])} failed: {why}" for rank, why in reasons.items()]
            silent = [rank for rank in range(self.world_size) if rank not in ends]
            if time.monotonic() > deadline or all(rank in processes and _has_ended(processes[rank]) for rank in silent):
                return self._fates(silent, processes)
            time.sleep(max(_SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS_A_RANK * self.world_size))

    def _fates(self, silent: list[int], processes: dict[int, RankProcess]) -> list[str]:
        """Return the state of ranks that have not reported; those that answer are named only if all do."""
        answers = self._read("answers")
        lost = [
            self._fate(rank, processes[rank]) if rank in processes else f"rank {rank} has not come"
            for rank in silent
            if rank not in answers or _has_ended(processes[rank])
        ]
        if lost or not silent:
            return lost
        shown = [f"{_name(rank, processes[rank])} is busy or waits {answers[rank]}" for rank in silent[:_MOST_SHOWN]]
        return shown + ([f"{len(silent) - _MOST_SHOWN} more do"] if len(silent) > _MOST_SHOWN else [])

    def _fate(self, rank: int, process: RankProcess) -> str:
        """Return the state of a rank that does not answer; kill it if it runs on this machine."""
        if _has_ended(process):
            return f"{_name(rank, process)} has ended"
        killed = self._trusted and _is_here(process) and _killed(process)
        return f"{_name(rank, process)} does not answer{' and is killed' * killed}"

    def _write(self, key: str, content: Any) -> None:
        text = json.dumps([self.rank, content])
        self._store.append(key, f"\n{self._signature(key, text)} {text}\n")  # a line also after a stranger's torn one

    def _read(self, key: str) -> dict[int, Any]:
        """Return what each rank has written to `key`, by rank."""
        if not self._store.check([key]):
            return {}
        rows = (line.partition(" ") for line in self._store.get(key).decode(errors="replace").splitlines())
        return dict(json.loads(text) for mac, _, text in rows if mac == self._signature(key, text))

    def _signature(self, key: str, text: str) -> str:
        return hmac.new(self._key, f"{key} {text}".encode(), hashlib.sha256).hexdigest()[:32]

    def _processes(self) -> dict[int, RankProcess]:
        return {rank: RankProcess(*process) for rank, process in self._read("processes").items()}

    def _ask(self, question: Callable[[], object]) -> None:
        """Query the store in a thread that may be left behind: the store may be gone or unreachable."""

        def ask() -> None:
            with suppress(RuntimeError):  # the store's host is gone
                question()

        thread = threading.Thread(target=ask, name="peers", daemon=True)
        thread.start()
        thread.join(2 * _SECONDS_TO_ASK)


def machine() -> str:
    """Return an identifier of the machine and the PID namespace, empty if there is none."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        seen = f"{socket.gethostname()} {started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: ended processes cannot be detected
        return ""
    return hashlib.sha256(seen.encode()).hexdigest()[:12]  # short, as all ranks read that of all


def _main_threads_line() -> str:
    """Return the line of Python that the main thread of this process executes."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "at its end"
    return f"at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _name(rank: int, process: RankProcess) -> str:
    return f"rank {rank} on {process.host} (process {process.pid})"


def _is_here(process: RankProcess) -> bool:
    return process.machine != "" and process.machine == machine()


def this_process(local_rank: int, gpus: int) -> RankProcess:
    """Return what others may know of this process."""
    pid, named = os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    promised = "" if named in ("-1", "NoDevFiles") else named
    return RankProcess(socket.gethostname(), pid, _started(pid), machine(), local_rank, gpus, promised)


def _has_ended(process: RankProcess) -> bool:
    """Return whether a process is known to have ended; another one may have its number by now."""
    return _is_here(process) and _started(process.pid) != process.started


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks since the machine did; empty if it has ended."""
    try:
        state, *rest = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()  # proc_pid_stat(5)
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def _killed(process: RankProcess) -> bool:
    """Kill a process of this machine, unless it has ended; return whether it was the one that is meant."""
    try:
        same = os.pidfd_open(process.pid)  # what it names does not change after the comparison
    except OSError:
        return False
    try:
        if _has_ended(process):
            return False
        signal.pidfd_send_signal(same, signal.SIGKILL)
    except OSError:  # it has ended meanwhile, or is another user's
        return False
    finally:
        os.close(same)
    return True
