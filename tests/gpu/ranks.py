"""Two ranks: on one GPU over gloo, which copies CUDA tensors through the host; on two GPUs as training has them."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_dcgan.distributed.world import World, process_group
from tests.gpu.items import Context, Figures, Skipped, kinds_on
from tests.gpu.training import Arrays, largest_difference, networks_after

RANKS = 2
STEPS = 5
_TIMEOUT = timedelta(seconds=60)
_FORK = get_context("fork")


@contextmanager
def gloo_group(folder: Path, rank: int, device: torch.device) -> Iterator[World]:
    """Join the other rank over gloo for CPU and CUDA tensors alike; ranks may share the device, which NCCL refuses."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), RANKS)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=_TIMEOUT)
    try:
        yield World(rank, rank, RANKS, device)
    finally:
        dist.destroy_process_group()


def on_ranks(function: Callable[[int], Any], count: int = RANKS) -> list[Any]:
    """Return what `function(rank)` returns in processes forked from this one, which must not have used CUDA yet."""
    assert not torch.cuda.is_initialized()
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=_rank, args=(theirs, function, rank), daemon=True)
        process.start()
        theirs.close()  # so that reading from a process that died raises EOFError
        pipes.append(ours)
        processes.append(process)
    results = [_received(pipe, rank) for rank, pipe in enumerate(pipes)]
    for process in processes:
        process.join()
    return results


def _rank(pipe: Connection[Any, Any], function: Callable[[int], Any], rank: int) -> None:
    try:
        pipe.send((function(rank), None))
    except BaseException as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))


def _received(pipe: Connection[Any, Any], rank: int) -> Any:
    try:
        result, error = pipe.recv()
    except EOFError:
        error = "the process died"
    assert error is None, f"rank {rank}: {error}"
    return result


def check_two_ranks(context: Context) -> Figures:
    """Compare two ranks on one device with one, in float64, with every batch norm that runs here."""
    folder = context.folder / "two_ranks"
    folder.mkdir(exist_ok=True)
    kinds = kinds_on(context.device)
    alone = on_ranks(partial(_trained_alone, context.device), 1)[0]
    both: list[dict[str, Arrays]] = on_ranks(partial(_trained_together, folder, context.device, kinds))
    figures: Figures = {}
    for kind in kinds:
        figures[f"{kind}_from_one_rank"] = largest_difference(both[0][kind], alone)
        figures[f"{kind}_between_ranks"] = largest_difference(both[0][kind], both[1][kind])
        assert figures[f"{kind}_from_one_rank"] <= 1e-9, f"{kind}: 2 ranks differ from 1: {figures}"
        assert figures[f"{kind}_between_ranks"] <= 1e-9, f"{kind}: the ranks differ: {figures}"
    return figures


def check_nccl_ranks(context: Context) -> Figures:
    """Compare two ranks as training starts them, over NCCL on two GPUs, with one."""
    if context.machine.gpus == 1:
        raise Skipped("needs two GPUs")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    alone = on_ranks(partial(_trained_alone, context.device), 1)[0]
    ranks = on_ranks(partial(_trained_under_torchrun, port, context.device.type))
    difference = max(largest_difference(rank, alone) for rank in ranks)
    assert difference <= 1e-9, f"2 ranks differ from 1 by {difference:.3g}"
    return {"largest_difference": difference}


def options_of(kind: str, sigma: float = 0.3) -> dict[str, Any]:
    """Return the options of a small training in float64."""
    small = {"width": 8, "global_batch": 8, "precision": "fp64", "noise": {"sigma": sigma}}
    return small | {"distributed": {"batchnorm": kind}}


def _trained_alone(device: torch.device, rank: int) -> Arrays:
    torch.set_num_threads(1)
    with process_group(60, device.type) as world:
        return networks_after(world, options_of("portable"), STEPS)


def _trained_together(folder: Path, device: torch.device, kinds: list[str], rank: int) -> dict[str, Arrays]:
    torch.set_num_threads(1)
    with gloo_group(folder, rank, device) as world:
        return {kind: networks_after(world, options_of(kind), STEPS) for kind in kinds}


def _trained_under_torchrun(port: int, device_type: str, rank: int) -> Arrays:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    with process_group(60, device_type) as world:
        return networks_after(world, options_of("portable"), STEPS)
