"""Times training from the loader against the same training on one constant batch: what feeding costs.

    torchrun --nproc_per_node=2 -m tests.benchmarks.feed SHARDS [--width 16] [--batch 128] [--rounds 10] [--steps 30]

Turns of both within one run, on ranks that share the machine's cores with their loaders; the median of the rounds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import Batch, BatchLoader, to_images
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.node import node_store
from dist_dcgan.distributed.world import process_group
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from shards.common.command_line import run
from tests.benchmarks.command import Benchmark, options_of
from tests.benchmarks.measuring import timed_together


class Feeding(Benchmark):
    """Time what feeding costs."""

    shards: CliPositionalArg[Path]
    """Data set."""
    width: int = Field(16, ge=1)
    """Width of the networks."""
    batch: int = Field(128, ge=2)
    """Images per step over all ranks."""
    rounds: int = Field(10, ge=1)
    """Rounds of a turn each."""
    steps: int = Field(30, ge=10)
    """Steps of a turn."""


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    options = options_of(Feeding, argv)
    with process_group(60) as world:
        place = Folder(options.shards)
        config = Config(width=options.width, global_batch=options.batch, epochs=1e6)
        plan = make_plan(config, world.world_size, place.manifest.samples)
        state = TrainState(config, plan, world, place.manifest.image_size)
        with BatchLoader(place, config, plan, world, 0, node_store(world)) as batches:
            fed = iter(batches)
            constant = itertools.repeat(next(fed))
            ratios = []
            for _ in range(plan.steps_per_epoch):  # an epoch in which every shard is checked
                step(state, fed)
            for _ in range(options.rounds):
                fed_seconds, constant_seconds = (
                    timed_together(partial(step, state, source), options.steps) for source in (fed, constant)
                )
                ratios.append(constant_seconds / fed_seconds)
        if world.is_main:
            print("rounds: " + " ".join(f"{ratio:.3f}" for ratio in sorted(ratios)))
            options.tell({"images/s from the loader, over those on one batch": statistics.median(ratios)})


def step(state: TrainState, batches: Iterator[Batch]) -> None:
    """Train on the next batch."""
    train_step(state, to_images(next(batches), state.dtype))


if __name__ == "__main__":
    run(main)
