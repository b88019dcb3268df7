"""Collectives that training needs, apart from those of DDP and batch norm.

Without a process group this is the only rank (`world.process_group`), and they communicate with nobody.
"""

from __future__ import annotations

import json
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
    """Call `function` on rank 0 and return its result, a JSON value, on all ranks; so is its UserError raised.

    The others wait in `group`: the default one, or `World.slow_group` if `function` may take minutes.
    Other exceptions of rank 0 are not passed on: the peers fail with the broken connection, and the process group
    reports the rank. Values travel as JSON: torch's object collectives would unpickle what a stranger may have sent.
    """
    if not dist.is_initialized():
        return function()
    content = b""
    if dist.get_rank() == 0:
        try:
            content = json.dumps({"result": function()}).encode()
        except UserError as error:
            content = json.dumps({"error": str(error)}).encode()
    size = torch.tensor([len(content)])
    dist.broadcast(size, src=0, group=group)
    sent = _bytes(content, int(size))
    dist.broadcast(sent, src=0, group=group)
    outcome = json.loads(sent.numpy().tobytes())
    if "error" in outcome:
        raise UserError(outcome["error"])
    result: Result = outcome["result"]
    return result


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, JSON values, by rank; they wait for each other in `group`, as above."""
    if not dist.is_initialized():
        return [value]
    content = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)]), group=group)
    longest = max(map(int, sizes))
    received = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(received, _bytes(content, longest), group=group)
    return [json.loads(text.numpy().tobytes()[: int(size)]) for text, size in zip(received, sizes, strict=True)]


def _bytes(content: bytes, size: int) -> torch.Tensor:
    """Return `content`, and zeros after it, as uint8 of this size."""
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)


def require_same(value: str, what: str, remedy: str) -> None:
    """Raise UserError on all ranks if `value` differs between them."""
    values = gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other}: {remedy}")


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
