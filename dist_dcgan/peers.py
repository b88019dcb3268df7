"""How ranks meet, and what became of the others where a collective breaks: who failed and why, ended, or hangs.

The ranks keep a board in the store through which they met; under torchrun it lives in the agent, so that it outlives
each of them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shards.errors import OneRankError

_SECONDS_TO_ASK = 2.0
_SECONDS_BETWEEN_LOOKS = 0.02
_SECONDS_BETWEEN_LOOKS_A_RANK = 0.001  # all of them ask one store


def meet_in(store: Any, rank: int, world_size: int, patience_seconds: float) -> Any:
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
    """The board of one process group: a list of where each rank is, and one of what the ranks that ended say."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """Enter this rank; `store` is one of torch.distributed."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._write("places", [socket.gethostname(), os.getpid()])

    def report(self, why: str) -> None:
        """Say that this rank fails by itself, and why."""
        self._ask(lambda: self._write("ends", why))

    def explain(self) -> str:
        """Return what ended the collective that broke on this rank.

        A rank of this machine that does not answer is killed, so that torchrun need not wait for it. Takes some seconds
        at most, whatever state the others are in. From now on SIGTERM is ignored: torchrun sends it as soon as one rank
        has ended, and this one is to say why.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reached, found = threading.Event(), []

        def look() -> None:
            self._write("ends", None)
            self._read("ends")  # writing waits for no answer
            reached.set()
            found.extend(self._explain())

        self._ask(look)
        if not reached.is_set():
            return f"{os.environ.get('MASTER_ADDR', 'the machine')}, where the ranks meet, cannot be reached"
        return "; ".join(found) or "a collective took too long, or a connection broke"

    def _explain(self) -> list[str]:
        deadline = time.monotonic() + _SECONDS_TO_ASK
        while True:
            ends = self._read("ends")
            places = self._read("places")  # after the ends: who has ended had a place before
            reasons = {rank: why for rank, why in ends.items() if why is not None}
            if reasons:
                return [f"{_name(rank, *places[rank])} failed: {why}" for rank, why in reasons.items()]
            silent = [rank for rank in range(self._world_size) if rank not in ends]
            if time.monotonic() > deadline or all(rank in places and _has_ended(*places[rank]) for rank in silent):
                return [
                    _fate(rank, *places[rank]) if rank in places else f"rank {rank} has not come" for rank in silent
                ]
            time.sleep(max(_SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS_A_RANK * self._world_size))

    def _write(self, board: str, content: Any) -> None:
        self._store.append(board, json.dumps([self._rank, content]) + "\n")

    def _read(self, board: str) -> dict[int, Any]:
        """Return what each rank has written, of those that have; this one has."""
        return dict(json.loads(line) for line in self._store.get(board).decode().splitlines())

    def _ask(self, question: Callable[[], object]) -> None:
        """Ask the store, which may be gone or cut off, in a thread that need not come back."""

        def ask() -> None:
            with suppress(RuntimeError):  # the store went with its host
                question()

        thread = threading.Thread(target=ask, name="peers", daemon=True)
        thread.start()
        thread.join(2 * _SECONDS_TO_ASK)


def _name(rank: int, host: str, pid: int) -> str:
    return f"rank {rank} on {host} (process {pid})"


def _has_ended(host: str, pid: int) -> bool:
    """Return whether a process is known to have ended."""
    return host == socket.gethostname() and not _alive(pid)


def _fate(rank: int, host: str, pid: int) -> str:
    """Return what became of a rank that says nothing; it is killed where it can be."""
    if _has_ended(host, pid):
        return f"{_name(rank, host, pid)} has ended"
    if host != socket.gethostname():
        return f"{_name(rank, host, pid)} does not answer"
    with suppress(ProcessLookupError):  # it ended meanwhile
        os.kill(pid, signal.SIGKILL)
    return f"{_name(rank, host, pid)} does not answer and is killed"


def broke(error: BaseException) -> bool:
    """Return whether an error is that of a collective."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


def first_sentence(error: BaseException) -> str:
    """Return what an error says, without the place in the source that torch puts before it and the advice after it."""
    text = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0])
    return f"{type(error).__name__}: {text.partition('. ')[0]}"


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(pid), "status").read_text()
    except OSError:
        return False
