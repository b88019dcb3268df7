"""Key-value store shared by the ranks of one node."""

from __future__ import annotations

import secrets
from typing import Any

import torch.distributed as dist

from dist_dcgan.distributed.collectives import from_rank_zero
from dist_dcgan.distributed.launch import launched
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


def node_store(world: World) -> NodeStore:
    """Return the store of the ranks that one torchrun started on this machine; every rank of the run calls it.

    Ranks that torchrun did not start have one each.
    """
    if world.world_size == 1:
        return NodeStore()
    name = from_rank_zero(lambda: f"node-{secrets.token_hex(8)}")  # a new one for each run in this process
    if world.folder is None:
        return NodeStore()
    size = launched().ranks_of_node
    return NodeStore(world.local_rank, size, world.folder.store(name, size))
