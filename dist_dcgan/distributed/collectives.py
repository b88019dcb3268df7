"""Collectives that training needs, apart from those of DDP and batch norm.

Without a process group this is the only rank (`world.process_group`), and they communicate with nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_dcgan.distributed.world import World
from shards.common.errors import UserError

Result = TypeVar("Result")


def barrier(world: World) -> None:
    """Wait until all ranks call it, which may take minutes."""
    if world.world_size > 1:
        dist.barrier(group=world.slow_group)


def from_rank_zero(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call `function` on rank 0 and return its result on all ranks; its UserError is raised on all ranks.

    The others wait in `group`: the default one, or `World.slow_group` if `function` may take minutes.
    Other exceptions of rank 0 are not passed on: the peers fail with the broken connection, and the process group
    reports the rank.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise UserError(outcome[1])
    result: Result = outcome[0]
    return result


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, by rank; they wait for each other in `group`, as in `from_rank_zero`."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def require_same(value: str, what: str) -> None:
    """Raise UserError on all ranks if `value` differs between them."""
    values = gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other}")


def broadcast_from_rank_zero(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite `tensors` on all ranks with those of rank 0; memory formats may differ."""
    if not dist.is_initialized():
        return
    for tensor in tensors:
        content = tensor.detach().contiguous()  # a contiguous copy: ranks must agree on the order of elements
        dist.broadcast(content, src=0)
        tensor.detach().copy_(content)


def average_across_ranks(rows: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Return the means over ranks of scalar tensors as floats; all rows have the same keys.

    Synchronises host and device. The result is the same on all ranks, and so are decisions based on it.
    """
    packed = torch.stack([value.detach() for row in rows for value in row.values()]).double()
    if dist.is_initialized():
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return [
        dict(zip(row, means.tolist(), strict=True)) for row, means in zip(rows, packed.chunk(len(rows)), strict=True)
    ]
