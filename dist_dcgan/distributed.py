"""Process group, rank and device, and the few collectives that the rest needs.

Works the same without torchrun: one process is then a world of size 1, with a process group of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from dist_dcgan.connections import require_connected
from dist_dcgan.devices import agreed_device, set_up
from dist_dcgan.failures import cannot_go_on, explained, first_sentence, is_alike
from dist_dcgan.peers import Peers, meet_in
from dist_dcgan.watch import Watch
from shards.command_line import run
from shards.errors import OneRankError, UserError

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # prctl(2)

PATIENT_SECONDS = 1800.0
"""Most seconds that ranks wait for each other where one may have to bring data, or to compute scores."""
MEETING_SECONDS = 300.0
"""Seconds in which all ranks must have started."""


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """For moments at which ranks may be minutes apart, over the CPU; None where the default group serves as well."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0


class Node:
    """This process among the ranks of its machine, and a board where they tell each other what they found."""

    def __init__(self, index: int = 0, size: int = 1, store: Any = None) -> None:
        """By default the only rank; `store` is one of torch.distributed."""
        self.index, self.size = index, size
        self._store = store or dist.HashStore()  # type: ignore[attr-defined]

    def tell(self, topic: str, text: str) -> None:
        """Put `text` on the board."""
        self._store.set(topic, text)

    def look(self, topic: str) -> str | None:
        """Return what stands on the board, None where nothing does yet."""
        return self._store.get(topic).decode() if self._store.check([topic]) else None


def meet_on_node(world: World, timeout_seconds: float) -> Node:
    """Return the node of this rank; every rank calls it. Ranks are on one machine where its name is the same."""
    if world.world_size == 1:
        return Node()
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
    return Node(ranks.index(world.rank), len(ranks), store)


def world_size_of_launch(expected: int | None) -> int:
    """Return the number of ranks that torchrun started, 1 without it; raises UserError where another is expected."""
    started_by_torchrun = "WORLD_SIZE" in os.environ
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and expected != world_size:
        found = f"torchrun started {world_size}" if started_by_torchrun else "this is one process without torchrun"
        remedy = (
            f"torchrun --nproc_per_node={expected} -m dist_dcgan.train"
            if expected > 1
            else "python -m dist_dcgan.train --world-size 1"
        )
        raise UserError(f"--world-size {expected}, but {found}: start it as `{remedy}`")
    return world_size


@contextmanager
def process_group(timeout_seconds: float, device_type: str | None = None) -> Iterator[World]:
    """Join the peers that torchrun started (or stand alone) and leave them at the end.

    CPU tensors travel over gloo and CUDA tensors over NCCL, so that small decisions never wait for the GPU. With
    `device_type` "cpu" no GPU is used; with "any", GPUs if every rank has one; by default GPUs, too, but a UserError is
    raised on all ranks if only some have one.
    """
    _die_with_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = 0 if device_type == "cpu" else torch.cuda.device_count()  # takes seconds: before the ranks meet
    store, rank, world_size = _meeting_point(max(timeout_seconds, MEETING_SECONDS))
    peers = Peers(dist.PrefixStore("peers", store), rank, world_size, local_rank, gpus)  # type: ignore[attr-defined]
    watch = Watch(peers, world_size, timeout_seconds, lambda cause: _end_at_once(cannot_go_on(peers, cause)))
    with watch if world_size > 1 else nullcontext(), _left_at_the_end(peers), explained(peers):
        device = agreed_device(peers.everyone(timeout_seconds), rank, lenient=device_type == "any")
        set_up(device)
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if nodes > 1:
            require_connected(store, int(os.environ["GROUP_RANK"]), nodes, leads=local_rank == 0)
        _init(dist.PrefixStore("group", store), peers, device, timeout_seconds)  # type: ignore[attr-defined]
        patient = _patient_group(timeout_seconds) if world_size > 1 else None
        yield World(rank, local_rank, world_size, device, patient)


def _init(store: Any, peers: Peers, device: torch.device, timeout_seconds: float) -> None:
    """Make the default group. NCCL, which names nobody, is to wait longer than gloo and the watch need to explain."""
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        store=store,
        rank=peers.rank,
        world_size=peers.world_size,
        device_id=device if on_gpu else None,
    )
    if on_gpu:  # torch has no argument for it: options of NCCL take the timeout of the call
        backend = dist.distributed_c10d._get_default_group()._get_backend(device)
        backend._set_default_timeout(timedelta(seconds=2 * timeout_seconds + 60))


@contextmanager
def _left_at_the_end(peers: Peers) -> Iterator[None]:
    """Leave the process group however it ends."""
    together = False
    try:
        yield
        together = True
    except BaseException as error:
        together = is_alike(error)
        raise
    finally:
        if together and peers.world_size > 1:
            peers.leave()
        if dist.is_initialized():
            _leave_group(together)


def _leave_group(together: bool) -> None:
    # Whatever still refers to the group, as DDP does in a reference cycle, would keep gloo's threads alive until the
    # interpreter ends, where a thread that lets go of a tensor aborts the process.
    gc.collect()
    if together or "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()
        return
    # NCCL's communicators end together: a rank that fails alone would wait here for peers that wait for it. On a GPU
    # that failed, these fail as well, and the first error is the one to be told.
    with suppress(RuntimeError):
        dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).abort()
        dist.destroy_process_group()


def _end_at_once(reason: str) -> None:
    """End this process, whatever its main thread waits for, as a OneRankError there would: its line, its status."""

    def fail(argv: Sequence[str]) -> None:
        raise OneRankError(reason)

    try:
        run(under_torchrun(fail), [])
    except SystemExit as ended:
        os._exit(int(ended.code or 0))


def _meeting_point(patience_seconds: float) -> tuple[Any, int, int]:
    """Return the store through which the ranks meet, this rank and their number, when all have come."""
    if "WORLD_SIZE" not in os.environ:
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=patience_seconds)))
        return meet_in(store, rank, world_size, patience_seconds), rank, world_size
    except (ValueError, RuntimeError) as error:  # torch's errors of stores are RuntimeErrors
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OneRankError(f"cannot meet the other ranks at {place} ({first_sentence(error)})") from error


def under_torchrun(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    """Return a command as torchrun starts it: what ends it is told to torchrun.

    Torchrun starts ranks again that have failed (--max-restarts), and names the first failure. A mistake of the user,
    which all ranks meet alike, is not tried again.
    """

    def started(argv: Sequence[str]) -> None:
        try:
            record(main)(argv)
        except OneRankError:
            raise
        except UserError:
            if os.environ.get("LOCAL_RANK") == "0" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun passes it on, and the mistake is to be said
                os.kill(os.getppid(), signal.SIGTERM)
            raise

    return started


def _die_with_torchrun() -> None:
    """Have the kernel kill this process when torchrun dies: it would train on, beside the run that takes its place."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _patient_group(timeout_seconds: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout_seconds, PATIENT_SECONDS)))
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


def meet(world: World) -> None:
    """Wait until all ranks are here, which may take them minutes."""
    if world.world_size > 1:
        dist.barrier(group=world.patient)


def from_rank_zero(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Call `function` on rank 0 and return its result on all ranks; its UserError is raised on all ranks.

    The others wait in `group`: the default one, or `World.patient` if `function` may take minutes.
    Whatever rank 0 decides or finds wrong, no peer is left waiting for it. Any other exception of rank 0 is not
    passed on: the peers then fail with the broken connection and the process group reports the rank.
    """
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


def require_same(value: str, what: str) -> None:
    """Raise UserError on all ranks where `value` differs between them."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{what} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other}")


def broadcast_from_rank_zero(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite `tensors` on all ranks with those of rank 0, whatever their memory format."""
    if dist.get_world_size() == 1:
        return
    for tensor in tensors:
        content = tensor.detach().contiguous()  # a contiguous copy: ranks must agree on the order of elements
        dist.broadcast(content, src=0)
        tensor.detach().copy_(content)


def average_across_ranks(rows: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Return the means over ranks of scalar tensors, as numbers; all rows have the same keys.

    Training waits for the device here. The numbers are the same on all ranks, so what follows from them is agreed.
    """
    packed = torch.stack([value.detach() for row in rows for value in row.values()]).double()
    if dist.get_world_size() > 1:
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return [
        dict(zip(row, means.tolist(), strict=True)) for row, means in zip(rows, packed.chunk(len(rows)), strict=True)
    ]
