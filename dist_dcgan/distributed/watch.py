"""Ends a rank that cannot go on while its main thread waits where no error and no signal reaches it.

A collective over gloo raises when a peer is gone. Over NCCL the main thread waits inside CUDA, sees neither the error
nor a signal, and NCCL aborts the process much later without a name. So a thread of each rank looks at the boards of
`peers`: CUDA, as all that waits in C for long, leaves the interpreter to other threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from dist_dcgan.distributed.peers import Peers

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LOOKS_A_RANK = 0.001  # all of them ask one store
_MOST_GRACE, _LEAST_GRACE = 20.0, 6.0
_SECONDS_TO_STOP = 2.0


def grace_seconds(timeout_seconds: float) -> float:
    """Return how long a main thread may take to end by itself once a rank has failed.

    The error that gloo raises there says more, and what leaves its blocks finishes a checkpoint. But torchrun kills the
    ranks of a node 30 s after one has ended, and the end should come before the timeout of collectives. Asking the
    others takes up to 4 s.
    """
    return min(_MOST_GRACE, max(_LEAST_GRACE, timeout_seconds / 3))


class Watch:
    """A thread that calls `end` with the reason when this rank cannot go on and does not end by itself.

    It answers the others that this process runs (`Peers.broken`), whether the main thread waits inside CUDA or hangs in
    a loop: neither is killed as silent. A main thread that hangs keeps nobody: the others end with its line in their
    message, and its own watch ends it. If a whole machine is lost while all other ranks wait inside CUDA, nobody can
    report it, and NCCL's timeout ends them.

    The watch shares the main thread's connection to the store, which torch locks for each question; the main thread
    waits in the store only while groups are made. A connection of its own (`Store.clone`) would be one more of each
    rank at the agent that holds the store: with 512 ranks, the usual limit of 1,024 open files.
    """

    def __init__(self, peers: Peers, world_size: int, timeout_seconds: float, end: Callable[[str], None]) -> None:
        """`timeout_seconds` is that of collectives."""
        self._peers, self._end = peers, end
        self._interval = max(_SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS_A_RANK * world_size)
        self._grace = grace_seconds(timeout_seconds)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch of peers", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join(_SECONDS_TO_STOP)  # it may wait for a store that does not answer

    def _watch(self) -> None:
        since: float | None = None
        while not self._stopping.wait(self._interval):
            try:
                broken = self._peers.broken()
            except RuntimeError:  # the store went with its host: collectives break by themselves
                return
            if not broken:
                since = None
                continue
            now = time.monotonic()
            since = now if since is None else since
            if now - since > self._grace:
                reason = self._peers.cause()
                if not self._stopping.is_set():  # the main thread ends after all
                    self._end(reason)
                return
