"""Runs a function on several ranks, as torchrun would start them, and returns what each returned."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 120


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in `world_size` processes of one thread each; results in the order of ranks.

    With one rank the process is started without torchrun's environment, as a person would. An error of any rank is
    raised here.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = _free_port()
    processes = [
        context.Process(target=_rank, args=(results, rank, world_size, port, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes = dict(results.get(timeout=SECONDS) for _ in processes)
    for process in processes:
        process.join(timeout=SECONDS)
    for rank, (_, error) in sorted(outcomes.items()):
        if error is not None:
            raise AssertionError(f"rank {rank} of {world_size}: {error}")
    return [outcomes[rank][0] for rank in range(world_size)]


def _rank(
    results: Any, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(1)
    try:
        results.put((rank, (function(*arguments), None)))
    except BaseException as error:
        results.put((rank, (None, repr(error))))
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
