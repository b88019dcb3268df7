"""A rank that does as it is told between two collectives: python -m tests.distributed.rank ACT,ACT,... TIMEOUT_SECONDS.

The acts are those of the ranks in their order; a rank that is started again does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dist_dcgan.distributed import world
from dist_dcgan.distributed.watch import grace_seconds
from dist_dcgan.distributed.world import process_group, run_rank
from shards.common.errors import UserError


def main(argv: Sequence[str]) -> None:
    """Act after a collective."""
    acts, timeout = argv[0].split(","), float(argv[1])
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with process_group(timeout, "cpu") as joined:
        dist.all_reduce(torch.ones(1))
        if start == "0":
            ACTS[acts[joined.rank]](timeout)
    os.write(1, f"ended well {start}\n".encode())  # at once: the others write, too


def fail(_: float) -> None:
    raise ValueError("it cannot go on")


def make_a_mistake(_: float) -> None:
    time.sleep(1 if os.environ["LOCAL_RANK"] == "0" else 0)  # the one that has to say it comes last
    raise UserError("a mistake of the user")


def hang(_: float) -> None:
    while True:  # as an endless loop would
        time.sleep(0.1)


ACTS: dict[str, Callable[[float], object]] = {
    "raise": fail,
    "mistake": make_a_mistake,
    "die": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "block": lambda _: ctypes.CDLL(None).pause(),  # without the interpreter's lock, as CUDA waits
    "work": lambda timeout: time.sleep(grace_seconds(timeout) + 4),
    "hang": hang,
    "reduce": lambda _: dist.all_reduce(torch.ones(1)),
    "leave": lambda _: None,
}

if __name__ == "__main__":
    world._SECONDS_TO_SAY_IT = 3
    run_rank(main)
