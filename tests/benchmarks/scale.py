"""Plans and steps as one rank of many, without the others: what a rank says, holds and reads at 8, 64 or 512 ranks.

    python -m tests.benchmarks.scale [--ranks 8,64,512] [--width 128] [--json FILE]

Each number of ranks has a process of its own that stands for rank 0, with the product's plan, state and step over a
fake process group. Counted, not timed, are the collectives of the third step (`collectives.py` says how) and whether
the slices of all ranks make up the global batch. The step takes a few images, as activations are not what is measured
here. The seconds are those of this machine, and hold as orders of magnitude.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from dist_dcgan.config import Config, Plan, make_plan
from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.data.order import Indices, SampleOrder
from dist_dcgan.data.storage.location import DatasetLocation, ShardFile
from dist_dcgan.distributed.collectives import average_across_ranks
from dist_dcgan.distributed.world import World
from dist_dcgan.training.stopping import StepAgreement
from dist_dcgan.training.train_state import TrainState
from shards.common.command_line import run
from shards.common.errors import UserError
from shards.conversion.convert import Settings
from shards.manifest import (
    MANIFEST_NAME,
    Layout,
    Manifest,
    Origin,
    ShardEntry,
    read_manifest,
    shard_name,
    write_manifest,
)
from tests.benchmarks.collectives import moments_and_gradients, one_of, recorded, recorded_step, reduce_at_once
from tests.benchmarks.command import Benchmark, Result, clocked, options_of
from tests.benchmarks.tables import Row, markdown, turned

IMAGE_SIZE = 64
TIMED_STEPS = 5


class Scaling(Benchmark):
    """Plan and step as one rank of many."""

    ranks: str = "8,64,512"
    """Numbers of ranks."""
    width: int = Field(128, ge=1)
    """Channels of the last hidden layer."""
    batch_per_rank: int = Field(128, ge=1)
    """Images per step and rank of the plan for weak scaling."""
    global_batch: int = Field(128, ge=2)
    """Images per step of the plan for strong scaling."""
    step_images: int = Field(2, ge=1)
    """Images of the step that is taken, on the one rank."""
    samples: str = "3033042,1000000000"
    """Sizes of data sets whose start-up is timed; the plans are made for the first."""


def numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(number) for number in text.split(",")]


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    options = options_of(Scaling, argv)
    counts = numbers(options.ranks)
    rows = [alone(as_one_rank, options, world_size) for world_size in counts]
    print(markdown(turned(rows)))
    print(f"\nWith a global batch of {options.global_batch} whatever the ranks:")
    for world_size in counts:
        print(f"- {world_size} ranks: {strong_plan(options, world_size)}")
    print("\nStart-up of one rank:\n")
    start_ups = []
    for samples in numbers(options.samples):
        with tempfile.TemporaryDirectory() as folder:
            alone(write_manifest_of, Path(folder), samples)
            start_ups.append(alone(start_up, Path(folder)))
    print(markdown(turned(start_ups)))
    options.keep({"ranks": rows, "start_up": start_ups})


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a process of its own makes of a call, so that its memory is its own as well."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def as_one_rank(options: Scaling, world_size: int) -> Row:
    """Return the figures of rank 0 of `world_size`."""
    manifest = manifest_of(numbers(options.samples)[0])
    config = Config(width=options.width, batch_per_rank=options.batch_per_rank)
    plan = make_plan(config, world_size, manifest.samples)
    small = config.model_copy(update={"batch_per_rank": options.step_images})
    with one_of(world_size) as world:
        before, started = memory_mib("RssAnon"), time.perf_counter()
        state = TrainState(small, make_plan(small, world_size, manifest.samples), world, IMAGE_SIZE)
        set_up_seconds = time.perf_counter() - started
        reduce_at_once(state)
        moments, gradients = moments_and_gradients(recorded_step(state))
        seconds = time.perf_counter() - started
        beside = recorded(beside_the_step)
        added, peak = memory_mib("RssAnon") - before, memory_mib("VmHWM")
    state_bytes = sum(tensor.nbytes for tensor in state.tensors().values())
    steps = (0, plan.steps_per_epoch - 1, plan.steps_per_epoch)
    return {
        "ranks": world_size,
        "global batch": plan.global_batch,
        "steps per epoch": plan.steps_per_epoch,
        "slices make up the batch": slices_make_up_the_batch(Nowhere(manifest), config, plan, steps),
        "reductions of moments": len(moments),
        "of moments, KB": sum(moments) / 1e3,
        "reductions of gradients": len(gradients),
        "of gradients, MB": sum(gradients) / 1e6,
        "the largest of them, MB": max(gradients) / 1e6,
        "reductions of stop flag and log": len(beside),
        "state, MiB": state_bytes / 2**20,
        "anonymous memory added, MiB": added,
        "peak of the process, MiB": peak,
        "set-up, s": set_up_seconds,
        "set-up and three steps, s": seconds,
        "order, ms a step": 1e3 * order_seconds(Nowhere(manifest), config, plan),
    }


def beside_the_step() -> None:
    """Do what the loop does beside a step that is logged: agree on whether to stop, average what was measured."""
    StepAgreement().agreed()
    average_across_ranks([{"loss": torch.zeros(())}])


def strong_plan(options: Scaling, world_size: int) -> str:
    """Return what the plan says where the global batch stays, or why there is none."""
    try:
        plan = make_plan(Config(global_batch=options.global_batch), world_size, numbers(options.samples)[0])
    except UserError as error:
        return f"error: {error}"
    return f"{plan.batch_per_rank} images per rank, {plan.steps_per_epoch:,} steps per epoch"


class Nowhere:
    """A place of which only the manifest is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def keep(self, shards: Collection[int]) -> None:
        """Do nothing."""

    def require_room(self, shards: int) -> None:
        """Do nothing."""

    def ready(self, shard: int) -> ShardFile:
        """Raise."""
        raise AssertionError


def slices_make_up_the_batch(location: DatasetLocation, config: Config, plan: Plan, steps: Sequence[int]) -> bool:
    """Return whether the samples of all ranks, one after the other, are the global batch at each of `steps`.

    Every rank has the product's own loader; none of them reads anything.
    """
    found: dict[int, list[Indices]] = {step: [] for step in steps}
    for rank in range(plan.world_size):
        loader = BatchLoader(location, config, plan, World(rank, rank, plan.world_size, torch.device("cpu")), 0)
        for step in steps:
            found[step].append(loader.samples(step))
    order = SampleOrder(location.manifest, config.seed, config.data.window_shards)
    for step, slices in found.items():
        epoch, start = divmod(step * plan.global_batch, plan.steps_per_epoch * plan.global_batch)
        together, expected = np.concatenate(slices), order.samples(epoch, start, start + plan.global_batch)
        if {len(part) for part in slices} != {plan.batch_per_rank} or not np.array_equal(together, expected):
            return False
        if len(np.unique(together)) != plan.global_batch:
            return False
    return True


def order_seconds(location: DatasetLocation, config: Config, plan: Plan) -> float:
    """Return the seconds a step in which rank 0 finds out its samples, over steps in a row."""
    loader = BatchLoader(location, config, plan, World(0, 0, plan.world_size, torch.device("cpu")), 0)
    loader.samples(0)
    started = time.perf_counter()
    for step in range(1, 1 + TIMED_STEPS):
        loader.samples(step)
    return (time.perf_counter() - started) / TIMED_STEPS


def manifest_of(samples: int) -> Manifest:
    """Return the manifest of a data set of that many samples that is not there, in shards of the usual size."""
    per_shard, layout = Settings().samples_per_shard, Layout(IMAGE_SIZE)
    counts = (min(per_shard, samples - first) for first in range(0, samples, per_shard))
    return Manifest(
        image_size=IMAGE_SIZE,
        samples_per_shard=per_shard,
        sources=(Origin(kind="lmdb", name="synthetic", entries=samples),),
        shards=tuple(
            ShardEntry(name=shard_name(index), samples=count, bytes=layout.shard_bytes(count), sha256=f"{index:064x}")
            for index, count in enumerate(counts)
        ),
    )


def write_manifest_of(directory: Path, samples: int) -> None:
    """Write the manifest of `manifest_of`."""
    write_manifest(directory, manifest_of(samples))


def start_up(directory: Path) -> Row:
    """Return what one rank needs for its manifest, its order, and the first samples from any step on."""
    config, before = Config(), memory_mib("RssAnon")
    manifest, reading = clocked(lambda: read_manifest(directory))
    added = memory_mib("RssAnon") - before
    _, digesting = clocked(manifest.digest)
    order, building = clocked(lambda: SampleOrder(manifest, config.seed, config.data.window_shards))
    batch, far = config.global_batch, manifest.samples * 3 // 4
    _, first = clocked(lambda: order.samples(0, 0, batch))
    _, later = clocked(lambda: order.samples(4, far, far + batch))
    _, again = clocked(lambda: order.samples(4, far, far + batch))
    return {
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "manifest, MB": (directory / MANIFEST_NAME).stat().st_size / 1e6,
        "read and checked, s": reading,
        "its anonymous memory, MiB": added,
        "digest, s": digesting,
        "order made, ms": 1e3 * building,
        "first batch, ms": 1e3 * first,
        "batch far on in epoch 4, ms": 1e3 * later,
        "batch of the same window, ms": 1e3 * again,
    }


def memory_mib(kind: str) -> float:
    """Return memory of this process in MiB: RssAnon is what it has now beside files, VmHWM its peak with them."""
    found = re.search(rf"^{kind}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    run(main)
