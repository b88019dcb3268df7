"""Ends a rank that cannot continue while its main thread is blocked inside CUDA.

A gloo collective raises when a peer is gone. With NCCL the main thread waits inside CUDA, where neither errors nor
signals reach it, and NCCL aborts the process much later without naming a rank. So a thread of each rank polls the
reports of `peers`; it can run because CUDA releases the interpreter lock while it waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dist_dcgan.distributed.peers import Peers

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LOOKS_A_RANK = 0.001  # all query one store
_MOST_GRACE, _LEAST_GRACE = 20.0, 6.0
_SECONDS_TO_STOP = 2.0


def grace_seconds(timeout_seconds: float) -> float:
    """Return how many seconds a main thread may take to end by itself after a rank has failed.

    Gloo's error there has more information, and unwinding finishes a checkpoint. But torchrun kills the ranks of a node
    30 s after one has ended, and the limit must be below the collectives' timeout. Querying the peers takes up to 4 s.
    """
    return min(_MOST_GRACE, max(_LEAST_GRACE, timeout_seconds / 3))


class Watch:
    """A thread that calls `end` with the reason if this rank cannot continue and does not end by itself.

    It answers the peers' queries (`Peers.broken`) even if the main thread waits inside CUDA or hangs in a loop, so that
    the rank is not killed as silent. If the main thread hangs, the peers end with its line in their message, and its
    own watch ends it. If a whole machine is lost while all other ranks wait inside CUDA, NCCL's timeout ends them.

    The watch shares the main thread's connection to the store, which torch locks for each query; the main thread waits
    in the store only while groups are made. A second connection per rank (`Store.clone`) would, with 512 ranks, reach
    the usual limit of 1,024 open files at the agent that holds the store.
    """

    def __init__(self, peers: Peers, world_size: int, timeout_seconds: float, end: Callable[[str], None]) -> None:
        """`timeout_seconds` is the collectives' timeout."""
        self._peers, self._end = peers, end
        self._interval = max(_SECONDS_BETWEEN_LOOKS, _SECONDS_BETWEEN_LOOKS_A_RANK * world_size)
        self._grace = grace_seconds(timeout_seconds)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch of peers", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(_SECONDS_TO_STOP)  # it may wait for a store that does not answer

    def _watch(self) -> None:
        since: float | None = None
        while not self._stopping.wait(self._interval):
            try:
                broken = self._peers.broken()
            except RuntimeError:  # the store's host is gone: collectives break by themselves
                return
            if not broken:
                since = None
                continue
            now = time.monotonic()
            since = now if since is None else since
            if now - since > self._grace:
                reason = self._peers.cause()
                if not self._stopping.is_set():  # else the main thread is ending
                    self._end(reason)
                return
