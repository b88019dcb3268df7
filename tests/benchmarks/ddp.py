"""Times two ranks of one thread against one process of two threads at the same global batch, on this CPU.

    python -m tests.benchmarks.ddp [--widths 16,64,128] [--batch 32] [--rounds 5] [--json FILE]

The product's step on constant batches. The processes of all variants live as long as the run and take turns; who waits
sleeps on a pipe. Ratios are taken within a round, then their median. Two more variants say where the time goes: one
process of one thread (what threads give), and two processes that hold half a batch each and know nothing of each other
(what two ranks would take without collectives). What collectives cost is told twice: as the time by which two ranks
take longer than two processes apart, which is all of it; and as the time that rank 0 spends in batch norm's reductions,
clocked around each. Either includes waiting for the slower rank.

It needs a machine that is otherwise idle: threads that lose their core to others keep each other waiting, and ratios do
not make up for that.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from dist_dcgan.config import Config, make_plan
from dist_dcgan.distributed.world import process_group
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from shards.common.command_line import run
from tests.benchmarks.command import Benchmark, options_of
from tests.benchmarks.measuring import constant_batch, timed_together
from tests.benchmarks.tables import Row, markdown

WARM_UP = 3
SECONDS_TO_END = 30


class Comparison(Benchmark):
    """Time two ranks against one process."""

    widths: tuple[int, ...] = (16, 64, 128)
    """Channels of the last hidden layer."""
    batch: int = Field(32, ge=4, multiple_of=2)
    """Images per step over all ranks."""
    rounds: int = Field(5, ge=1)
    """Rounds in which all variants take a turn."""
    seconds: float = Field(4.0, gt=0)
    """Seconds of a turn, about; two steps at least."""


class Variant(NamedTuple):
    """Processes that share the batch, of so many threads each."""

    name: str
    processes: int
    threads: int
    together: bool = True


RANKS = Variant("2 ranks x 1 thread", 2, 1)
THREADS = Variant("1 process x 2 threads", 1, 2)
ONE = Variant("1 process x 1 thread", 1, 1)
APART = Variant("2 processes apart", 2, 1, together=False)
VARIANTS = (RANKS, THREADS, ONE, APART)


class Turn(NamedTuple):
    """What one turn took."""

    seconds: float
    """Until the last process was done."""
    moments: float
    """Seconds that the first process was in reductions of moments."""


def main(argv: Sequence[str]) -> None:
    """Run the rounds for each width and print a table."""
    options = options_of(Comparison, argv)
    rows = []
    for width in options.widths:
        rows.append(summarise(width, options.batch, *turns_of(width, options)))
        print(markdown(rows[-1:]), flush=True)
    if len(rows) > 1:
        print(f"\n{markdown(rows)}")
    options.keep(rows)


def turns_of(width: int, options: Comparison) -> tuple[int, dict[Variant, list[Turn]]]:
    """Return the number of steps of a turn, and the turns of each variant by rounds."""
    turns: dict[Variant, list[Turn]] = {variant: [] for variant in VARIANTS}
    teams = {variant: Team(variant, width, options.batch) for variant in VARIANTS}
    try:
        slowest = max(team.turn(WARM_UP).seconds / WARM_UP for team in teams.values())
        steps = max(2, math.ceil(options.seconds / slowest))
        for round_ in range(options.rounds):
            for variant in VARIANTS if round_ % 2 == 0 else reversed(VARIANTS):
                turns[variant].append(teams[variant].turn(steps))
    finally:
        for team in teams.values():
            team.end()
    return steps, turns


def summarise(width: int, batch: int, steps: int, turns: dict[Variant, list[Turn]]) -> Row:
    """Return the figures of one width, medians of the rounds."""
    seconds = {variant: [turn.seconds for turn in turns[variant]] for variant in VARIANTS}

    def over(variant: Variant, other: Variant) -> list[float]:
        """Return the images/s of `variant` over those of `other`, by rounds."""
        return [theirs / ours for ours, theirs in zip(seconds[variant], seconds[other], strict=True)]

    efficiency = over(RANKS, THREADS)
    return {
        "width": width,
        "batch": batch,
        **{f"{v.name}, images/s": batch * steps / statistics.median(seconds[v]) for v in VARIANTS},
        "2 ranks over 2 threads": statistics.median(efficiency),
        "rounds": f"{min(efficiency):.2f}-{max(efficiency):.2f}",
        "2 ranks over 1 thread": statistics.median(over(RANKS, ONE)),
        "2 threads over 1": statistics.median(over(THREADS, ONE)),
        "share of collectives": 1 - statistics.median(over(RANKS, APART)),
        "share in moments": statistics.median(turn.moments / turn.seconds for turn in turns[RANKS]),
    }


class Team:
    """The processes of one variant."""

    def __init__(self, variant: Variant, width: int, batch: int) -> None:
        context, port = get_context("spawn"), _free_port()
        self._pipes: list[Connection[int, Turn]] = []
        self._processes = []
        for rank in range(variant.processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, variant, rank, port, width, batch), daemon=True)
            process.start()
            theirs.close()  # so that reading from a process that died raises EOFError
            self._pipes.append(ours)
            self._processes.append(process)

    def turn(self, steps: int) -> Turn:
        """Have all processes take some steps."""
        for pipe in self._pipes:
            pipe.send(steps)
        turns = [pipe.recv() for pipe in self._pipes]
        return Turn(max(turn.seconds for turn in turns), turns[0].moments)

    def end(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(0)
        for process in self._processes:
            process.join(SECONDS_TO_END)


def work(pipe: Connection[Turn, int], variant: Variant, rank: int, port: int, width: int, batch: int) -> None:
    """Take turns as one process of a variant until told to take no step."""
    torch.set_num_threads(variant.threads)
    if variant.processes > 1 and variant.together:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": variant.processes}
        os.environ |= {name: str(value) for name, value in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group(600, "cpu") as world:
        config = Config(width=width, global_batch=batch // variant.processes * world.world_size)
        state = TrainState(config, make_plan(config, world.world_size, 10 * batch), world, 64)
        real = constant_batch(state)
        while steps := pipe.recv():
            pipe.send(turn(state, real, steps))


def turn(state: TrainState, real: Tensor, steps: int) -> Turn:
    """Take some steps, begun and ended together by the ranks."""
    with clocked_reductions() as seconds:
        return Turn(timed_together(lambda: train_step(state, real), steps), sum(seconds))


@contextmanager
def clocked_reductions() -> Iterator[list[float]]:
    """Collect the seconds of each reduction that Python waits for: those of batch norm; DDP's go another way."""
    seconds: list[float] = []
    reduce = dist.all_reduce

    def clocked(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        done = reduce(*arguments, **options)
        seconds.append(time.perf_counter() - started)
        return done

    with mock.patch.object(dist, "all_reduce", clocked):
        yield seconds


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run(main)
