"""Runs a function on several ranks, as torchrun would start them, and returns what each returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from tests.support.forks import become, context, here

SECONDS = 120


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in `world_size` processes of one thread each; results in the order of ranks.

    With one rank the process is started without torchrun's environment, as a person would. An error of any rank is
    raised here.
    """
    started = context()
    results: Any = started.Queue()
    # As torchrun's agent has one: a port that is only looked for may be taken before rank 0 listens there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world_size)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    common |= {"LOCAL_WORLD_SIZE": str(world_size), "TORCHELASTIC_ERROR_FILE": f"{uuid4()}/attempt_0/0/error.json"}
    processes = []
    for rank in range(world_size):
        ours = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
        environment, directory, streams = here()
        place = (environment | ours, directory, streams)
        processes.append(started.Process(target=_rank, args=(results, rank, place, function, arguments), daemon=True))
    for process in processes:
        process.start()
    outcomes = dict(results.get(timeout=SECONDS) for _ in processes)
    for process in processes:
        process.join(timeout=SECONDS)
    for rank, (_, error) in sorted(outcomes.items()):
        if error is not None:
            raise AssertionError(f"rank {rank} of {world_size}: {error}")
    return [outcomes[rank][0] for rank in range(world_size)]


def _rank(results: Any, rank: int, place: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    become(*place)
    torch.set_num_threads(1)
    try:
        results.put((rank, (function(*arguments), None)))
    except BaseException as error:
        results.put((rank, (None, repr(error))))
        raise
