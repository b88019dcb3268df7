"""Process group, rank and device.

One process has no process group: it needs no network, no host name and no interface. Code that runs on one rank or
several calls `collectives`, or asks `dist.is_initialized()`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from dist_dcgan.distributed.connections import require_connected
from dist_dcgan.distributed.devices import agreed_device, set_up
from dist_dcgan.distributed.error_file import ErrorFile
from dist_dcgan.distributed.failures import cannot_go_on, explained, first_sentence, is_alike
from dist_dcgan.distributed.launch import Launch, launched
from dist_dcgan.distributed.peers import Peers, rendezvous, this_process
from dist_dcgan.distributed.private import PrivateFolder, private_folder
from dist_dcgan.distributed.strangers import own_sockets, require_no_strangers, warn_of_open_agent
from dist_dcgan.distributed.watch import Watch
from shards.common.command_line import run
from shards.common.errors import OneRankError, UserError

_SECONDS_TO_SAY_IT = 60.0
"""Seconds in which the first rank of a node prints a mistake of the user that all of its ranks have found."""
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LOOPBACK = "lo"

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
    folder: PrivateFolder | None = None
    """What the ranks that torchrun started on this machine share; None: it did not start them."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0


def world_size_of_launch(expected: int | None) -> int:
    """Return the number of ranks that torchrun started, 1 without it; raises UserError if `expected` differs."""
    launch = launched()
    if expected is not None and expected != launch.world_size:
        found = (
            f"torchrun started {launch.world_size}" if launch.by_torchrun else "this is one process without torchrun"
        )
        remedy = (
            f"torchrun --nproc_per_node={expected} -m dist_dcgan.train"
            if expected > 1
            else "python -m dist_dcgan.train --world-size 1"
        )
        raise UserError(f"--world-size {expected}, but {found}: start it as `{remedy}`")
    return launch.world_size


@contextmanager
def process_group(timeout_seconds: float, device_type: str | None = None) -> Iterator[World]:
    """Join the ranks that torchrun started and leave them at the end; one process joins nobody.

    Gloo handles CPU tensors and NCCL handles CUDA tensors, so that small decisions never wait for the GPU. With
    `device_type` "cpu" no GPU is used; with "any", GPUs if every rank has one; by default the same, but a UserError is
    raised on all ranks if only some have one, or none although CUDA_VISIBLE_DEVICES names some.
    """
    _die_with_torchrun()
    launch = launched()
    gpus = 0 if device_type == "cpu" else torch.cuda.device_count()  # takes seconds, so before the rendezvous
    lenient = device_type is not None
    if launch.world_size == 1:
        device = agreed_device({0: this_process(0, gpus)}, 0, lenient)
        set_up(device)
        yield World(0, 0, 1, device)
        return
    with private_folder(launch) as folder:
        # On one machine nothing listens but gloo and NCCL, and they on the loopback interface.
        alone = folder if launch.ranks_of_node == launch.world_size else None
        if launch.local_rank == 0:
            warn_of_open_agent(launch)
        if alone is not None:
            os.environ |= {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}
        os.environ.setdefault("NCCL_RAS_ENABLE", "0")  # NCCL 2.24 would open ports that answer to every user
        others = own_sockets()
        store = _meeting_point(launch, alone, max(timeout_seconds, MEETING_SECONDS))
        rank, world_size = launch.rank, launch.world_size
        key = os.environ.get("DIST_DCGAN_SECRET", "").encode() or None if alone is None else b""
        peers = Peers(dist.PrefixStore("peers", store), rank, world_size, launch.local_rank, gpus, key)  # type: ignore[attr-defined]
        watch = Watch(peers, world_size, timeout_seconds, lambda cause: _end_at_once(cannot_go_on(peers, cause)))
        with watch, _left_at_the_end(peers), explained(peers):
            device = agreed_device(peers.everyone(timeout_seconds), rank, lenient)
            set_up(device)
            if launch.nodes > 1:
                require_connected(store, launch.node, launch.nodes, leads=launch.local_rank == 0)
            with _standard_output_kept():
                _init(dist.PrefixStore("group", store), peers, device, timeout_seconds)  # type: ignore[attr-defined]
                slow_group = _slow_group(timeout_seconds)
            require_no_strangers(others)
            yield World(rank, launch.local_rank, world_size, device, slow_group, folder)


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
def _standard_output_kept() -> Iterator[None]:
    """Send what libraries print on standard output to standard error: gloo of torch 2.10 reports its connections.

    What a command prints, such as a line of JSON, must stay alone.
    """
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(output, 1)
        os.close(output)


@contextmanager
def _left_at_the_end(peers: Peers) -> Iterator[None]:
    """Leave the process group at the end, also after an exception."""
    all_ranks_end = False
    try:
        yield
        all_ranks_end = True
    except BaseException as error:
        all_ranks_end = is_alike(error)
        _clear_frames(error)
        raise
    finally:
        if all_ranks_end:
            peers.leave()
        if dist.is_initialized():
            _leave_group(all_ranks_end)


def _clear_frames(error: BaseException | None) -> None:
    """Drop the variables of the functions that `error` has ended, which its traceback keeps.

    NCCL waits for ever for the end of CUDA graphs that have recorded its calls before it destroys a communicator.
    """
    cleared: list[BaseException] = []
    while error is not None and error not in cleared:
        traceback.clear_frames(error.__traceback__)
        cleared.append(error)
        error = error.__cause__ or error.__context__


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


def _meeting_point(launch: Launch, folder: PrivateFolder | None, timeout_seconds: float) -> Any:
    """Wait until all ranks have joined; return the rendezvous store: a file in `folder`, else that of torchrun."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}" if folder is None else str(folder.path)
    try:
        if folder is None:
            store, _, _ = next(torch_rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        else:
            store = folder.store("ranks", launch.world_size)
            store.set_timeout(timedelta(seconds=timeout_seconds))
        return rendezvous(store, launch.rank, launch.world_size, timeout_seconds)
    except (ValueError, RuntimeError) as error:  # torch's store errors are RuntimeErrors
        raise OneRankError(f"cannot meet the other ranks at {place} ({first_sentence(error)})") from error


def run_rank(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Run a command as `run` does, as one of torchrun's ranks, and let torchrun learn of its errors.

    Torchrun restarts failed ranks (--max-restarts) and names the first failure. A UserError, which is raised on all
    ranks, ends it without a restart, after the first rank of the node has printed it.
    """
    launch = Launch()
    mistakes: list[UserError] = []

    def recorded(argv: Sequence[str]) -> None:
        nonlocal launch
        launch = launched()
        try:
            record(main, ErrorFile())(argv)
        except OneRankError:
            raise
        except UserError as error:
            mistakes.append(error)
            if launch.local_rank == 0:
                raise
            _wait_for_sigterm(_SECONDS_TO_SAY_IT)
            raise OneRankError(f"rank {launch.rank}, alone: {error}") from error

    try:
        run(recorded, argv)
    except SystemExit:
        if mistakes and launch.local_rank == 0 and launch.by_torchrun and _restarts():
            for _ in range(5):  # torchrun's own error handling may swallow the exception that a signal raises in it
                os.kill(os.getppid(), signal.SIGTERM)
                _wait_for_sigterm(2)
        raise


def _restarts() -> bool:
    """Return whether torchrun starts failed ranks again."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


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
