"""Process group, rank and device.

Without torchrun, one process is a world of size 1 with a process group of its own.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import time
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

_SECONDS_TO_SAY_IT = 60.0
_PR_SET_PDEATHSIG = 1  # prctl(2)

SLOW_SECONDS = 1800.0
"""Seconds that ranks wait for each other while one may fetch data or compute scores."""
MEETING_SECONDS = 300.0
"""Seconds in which all ranks must have started."""


@dataclass(frozen=True)
class World:
    """Rank, device and process groups of this process."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    slow_group: dist.ProcessGroup | None = None
    """Gloo group with a timeout of SLOW_SECONDS, for ranks that may be minutes apart; None: use the default group."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0


def world_size_of_launch(expected: int | None) -> int:
    """Return the number of ranks that torchrun started, 1 without it; raises UserError if `expected` differs."""
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
    """Join the ranks that torchrun started, or a group of one, and leave it at the end.

    Gloo handles CPU tensors and NCCL handles CUDA tensors, so that small decisions never wait for the GPU. With
    `device_type` "cpu" no GPU is used; with "any", GPUs if every rank has one; by default the same, but a UserError is
    raised on all ranks if only some have one.
    """
    _die_with_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = 0 if device_type == "cpu" else torch.cuda.device_count()  # takes seconds, so before the rendezvous
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
    """Make the default group. NCCL's timeout is longer, so that gloo or the watch, which name the rank, act first."""
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=timedelta(seconds=timeout_seconds),
        store=store,
        rank=peers.rank,
        world_size=peers.world_size,
        device_id=device if on_gpu else None,
    )
    if on_gpu:  # torch has no argument for it: NCCL's options take the call's timeout
        backend = dist.distributed_c10d._get_default_group()._get_backend(device)
        backend._set_default_timeout(timedelta(seconds=2 * timeout_seconds + 60))


@contextmanager
def _left_at_the_end(peers: Peers) -> Iterator[None]:
    """Leave the process group at the end, also after an exception."""
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
    # References to the group, such as DDP's reference cycle, would keep gloo's threads alive until the interpreter
    # exits, where a thread that releases a tensor aborts the process.
    gc.collect()
    if all_ranks_end or "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()
        return
    # NCCL's communicators are destroyed collectively: a rank that fails alone would deadlock, so it aborts them. On a
    # failed GPU that raises, too; the first error is the one to report.
    with suppress(RuntimeError):
        dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).abort()
        dist.destroy_process_group()


def _end_at_once(reason: str) -> None:
    """End this process at once, with the message and exit status of a OneRankError in the main thread."""

    def fail(argv: Sequence[str]) -> None:
        raise OneRankError(reason)

    try:
        run_rank(fail, [])
    except SystemExit as ended:
        os._exit(int(ended.code or 0))


def _meeting_point(timeout_seconds: float) -> tuple[Any, int, int]:
    """Wait until all ranks have joined; return the rendezvous store, this rank and the world size."""
    if "WORLD_SIZE" not in os.environ:
        return dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    try:
        store, rank, world_size = next(torch_rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        return rendezvous(store, rank, world_size, timeout_seconds), rank, world_size
    except (ValueError, RuntimeError) as error:  # torch's store errors are RuntimeErrors
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OneRankError(f"cannot meet the other ranks at {place} ({first_sentence(error)})") from error


def run_rank(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a command as `run` does, as one of torchrun's ranks, and let torchrun learn of its errors.

    Torchrun restarts failed ranks (--max-restarts) and names the first failure. A UserError, which is raised on all
    ranks, ends it without a restart, after the first rank of the node has printed it.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    mistakes: list[UserError] = []

    def recorded(argv: Sequence[str]) -> None:
        try:
            record(main)(argv)
        except OneRankError:
            raise
        except UserError as error:
            mistakes.append(error)
            if is_first:
                raise
            _wait_for_sigterm(_SECONDS_TO_SAY_IT)
            raise OneRankError(f"rank {os.environ.get('RANK')}, alone: {error}") from error

    try:
        run(recorded, argv)
    except SystemExit:
        if mistakes and is_first and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            for _ in range(5):  # torchrun's own error handling may swallow the exception that a signal raises in it
                os.kill(os.getppid(), signal.SIGTERM)
                _wait_for_sigterm(2)
        raise


def _wait_for_sigterm(seconds: float) -> None:
    """Wait for the SIGTERM by which torchrun ends its ranks, which ends this process at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(seconds)


def _die_with_torchrun() -> None:
    """Have the kernel kill this process when torchrun dies; it would otherwise keep training beside a restarted run."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _slow_group(timeout_seconds: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=max(timeout_seconds, SLOW_SECONDS)))
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group
