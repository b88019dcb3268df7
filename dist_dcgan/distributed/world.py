"""Process group, rank and device.

Works the same without torchrun: one process is then a world of size 1, with a process group of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from dist_dcgan.distributed.connections import require_connected
from dist_dcgan.distributed.devices import agreed_device, set_up
from dist_dcgan.distributed.failures import cannot_go_on, explained, first_sentence, is_alike
from dist_dcgan.distributed.peers import Peers, rendezvous
from dist_dcgan.distributed.watch import Watch
from shards.common.command_line import run
from shards.common.errors import OneRankError, UserError

_PR_SET_PDEATHSIG = 1  # prctl(2)

SLOW_SECONDS = 1800.0
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
    slow_group: dist.ProcessGroup | None = None
    """For moments at which ranks may be minutes apart, over the CPU; None where the default group serves as well."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0


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
        slow_group = _slow_group(timeout_seconds) if world_size > 1 else None
        yield World(rank, local_rank, world_size, device, slow_group)


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
    all_ranks_end = False
    try:
        yield
        all_ranks_end = True
    except BaseException as error:
        all_ranks_end = is_alike(error)
        raise
    finally:
        if all_ranks_end and peers.world_size > 1:
            peers.leave()
        if dist.is_initialized():
            _leave_group(all_ranks_end)


def _leave_group(all_ranks_end: bool) -> None:
    # Whatever still refers to the group, as DDP does in a reference cycle, would keep gloo's threads alive until the
    # interpreter ends, where a thread that lets go of a tensor aborts the process.
    gc.collect()
    if all_ranks_end or "nccl" not in dist.get_backend_config():
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
        store, rank, world_size = next(torch_rendezvous("env://", timeout=timedelta(seconds=patience_seconds)))
        return rendezvous(store, rank, world_size, patience_seconds), rank, world_size
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


def _slow_group(timeout_seconds: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout_seconds, SLOW_SECONDS)))
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group
