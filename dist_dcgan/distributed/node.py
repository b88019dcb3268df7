"""Key-value store shared by the ranks of one node."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dist_dcgan.distributed.collectives import gather
from dist_dcgan.distributed.world import World


class NodeStore:
    """Key-value store shared on the node; `index` is this process's index among its `size` ranks there."""

    def __init__(self, index: int = 0, size: int = 1, store: Any = None) -> None:
        """`store` is one of torch.distributed; by default this is the node's only rank."""
        self.index, self.size = index, size
        self._store = store or dist.HashStore()  # type: ignore[attr-defined]

    def set(self, key: str, value: str) -> None:
        """Set the value of `key`."""
        self._store.set(key, value)

    def get(self, key: str) -> str | None:
        """Return the value of `key`, None if it is not set yet."""
        return self._store.get(key).decode() if self._store.check([key]) else None


def node_store(world: World, timeout_seconds: float) -> NodeStore:
    """Return the store of this rank's node; every rank calls it. Ranks with the same host name are on one node."""
    if world.world_size == 1:
        return NodeStore()
    names = gather(socket.gethostname())
    ranks = [rank for rank, name in enumerate(names) if name == names[world.rank]]
    timeout = timedelta(seconds=timeout_seconds)
    store: Any = None
    if world.rank == ranks[0]:
        store = dist.TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    ports = gather(None if store is None else store.port)
    if store is None:
        store = dist.TCPStore("localhost", ports[ranks[0]], is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return NodeStore(ranks.index(world.rank), len(ranks), store)
