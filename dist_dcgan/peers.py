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
    """The board of one process group."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        """Enter this rank; `store` is one of torch.distributed."""
        self._store, self._rank, self._world_size = store, rank, world_size
        store.set(f"place {rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def report(self, why: str) -> None:
        """Say that this rank fails by itself, and why."""
        self._ask(lambda: self._store.set(f"failed {self._rank}", json.dumps(why)))

    def explain(self) -> str:
        """Return what ended the collective that broke on this rank.

        A rank of this machine that does not answer is killed, so that torchrun need not wait for it. Takes some seconds
        at most, whatever state the others are in. From now on SIGTERM is ignored: torchrun sends it as soon as one rank
        has ended, and this one is to say why.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        found: list[str] = []
        if not self._ask(lambda: found.extend(self._explain())):
            return f"{os.environ.get('MASTER_ADDR', 'the machine')}, where the ranks meet, cannot be reached"
        return "; ".join(found) or "a collective took too long, or a connection broke"

    def _explain(self) -> list[str]:
        self._store.set(f"failed {self._rank}", json.dumps(None))
        deadline = time.monotonic() + _SECONDS_TO_ASK
        while True:
            reported = {rank for rank in range(self._world_size) if self._store.check([f"failed {rank}"])}
            reasons = {rank: why for rank in reported if (why := self._read(f"failed {rank}")) is not None}
            if reasons:
                return [f"{self._name(rank)} failed: {why}" for rank, why in reasons.items()]
            silent = [rank for rank in range(self._world_size) if rank not in reported]
            if time.monotonic() > deadline or all(self._has_ended(rank) for rank in silent):
                return [self._fate(rank) for rank in silent]
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _fate(self, rank: int) -> str:
        if not self._store.check([f"place {rank}"]):
            return f"rank {rank} has not come"
        host, pid = self._read(f"place {rank}")
        if self._has_ended(rank):
            return f"{self._name(rank)} has ended"
        if host != socket.gethostname():
            return f"{self._name(rank)} does not answer"
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.kill(pid, signal.SIGKILL)
        return f"{self._name(rank)} does not answer and is killed"

    def _has_ended(self, rank: int) -> bool:
        """Return whether the process of a rank is known to have ended."""
        if not self._store.check([f"place {rank}"]):
            return False
        host, pid = self._read(f"place {rank}")
        return host == socket.gethostname() and not _alive(pid)

    def _name(self, rank: int) -> str:
        host, pid = self._read(f"place {rank}")
        return f"rank {rank} on {host} (process {pid})"

    def _read(self, key: str) -> Any:
        return json.loads(self._store.get(key))

    def _ask(self, question: Callable[[], object]) -> bool:
        """Ask the store, which may be gone, in a thread that need not come back; return whether it answered."""
        answered = threading.Event()

        def ask() -> None:
            with suppress(RuntimeError):  # the store went with its host
                question()
                answered.set()

        threading.Thread(target=ask, name="peers", daemon=True).start()
        return answered.wait(2 * _SECONDS_TO_ASK)


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
