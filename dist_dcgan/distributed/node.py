"""The ranks of one machine, and a key-value store that they share."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dist_dcgan.distributed.world import World


class NodeStore:
    """This process among the ranks of its machine, and a board where they tell each other what they found."""

    def __init__(self, index: int = 0, size: int = 1, store: Any = None) -> None:
        """By default the only rank; `store` is one of torch.distributed."""
        self.index, self.size = index, size
        self._store = store or dist.HashStore()  # type: ignore[attr-defined]

    def set(self, topic: str, text: str) -> None:
        """Put `text` on the board."""
        self._store.set(topic, text)

    def get(self, topic: str) -> str | None:
        """Return what stands on the board, None where nothing does yet."""
        return self._store.get(topic).decode() if self._store.check([topic]) else None


def node_store(world: World, timeout_seconds: float) -> NodeStore:
    """Return the node of this rank; every rank calls it. Ranks are on one machine where its name is the same."""
    if world.world_size == 1:
        return NodeStore()
    names: list[Any] = [None] * world.world_size
    dist.all_gather_object(names, socket.gethostname())
    ranks = [rank for rank, name in enumerate(names) if name == names[world.rank]]
    timeout = timedelta(seconds=timeout_seconds)
    store: Any = None
    if world.rank == ranks[0]:
        store = dist.TCPStore("localhost", 0, is_master=True, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    ports: list[Any] = [None] * world.world_size
    dist.all_gather_object(ports, None if store is None else store.port)
    if store is None:
        store = dist.TCPStore("localhost", ports[ranks[0]], is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return NodeStore(ranks.index(world.rank), len(ranks), store)
