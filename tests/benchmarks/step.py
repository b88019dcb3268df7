"""Times the training step against the usual DCGAN loop and against the machine's matrix-product floor.

    python -m tests.benchmarks.step [--width 128] [--batch 32] [--rounds 5] [--json FILE]

All in one run, taking turns, so that the ratios hold on a noisy machine. Within a turn steps follow one another without
waiting for the device, as in training. "Plain" is the loop that most ports have; "tuned" is the same loop with what
people give it who look after speed (`plain.py`). The floor is the time of the step's floating-point operations at
the best rate that any large product has reached in any round (`measuring.Products`).
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor

from dist_dcgan.config import Config, Plan, WandbOptions, make_plan
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.run.checkpoint import Retention
from dist_dcgan.run.saver import Saver
from dist_dcgan.training import loop
from dist_dcgan.training.ema import update_ema
from dist_dcgan.training.graph import TakeStep, prepare_step, training_stream
from dist_dcgan.training.steps import Metrics, train_step
from dist_dcgan.training.train_state import TrainState
from shards.common.command_line import run
from shards.conversion.convert import convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import write_demo
from tests.benchmarks.command import Benchmark, medians, options_of
from tests.benchmarks.measuring import (
    WARM_UP,
    Call,
    Products,
    calls_within,
    compute_dtype,
    constant_batch,
    images,
    step_flops,
    synchronize,
    timed,
)
from tests.benchmarks.plain import PlainLoop

CHECKPOINT_EVERY = 1000
LOOP_STEPS = 12


class Stepping(Benchmark):
    """Time the training step."""

    width: int = Field(128, ge=1)
    """Channels of the last hidden layer."""
    batch: int = Field(32, ge=2)
    """Images per step."""
    rounds: int = Field(5, ge=1)
    """Rounds in which all variants take a turn."""
    turn_seconds: float = Field(0.5, gt=0)
    """Seconds of a turn, about; one step at least."""
    writing_seconds: float = Field(4.0, gt=0)
    """Seconds of training in which a checkpoint is written beside it."""
    square: int | None = Field(None, ge=1)
    """Size of the square products; by default those that suit the device."""


def main(argv: Sequence[str]) -> None:
    """Run the rounds and print the medians."""
    options = options_of(Stepping, argv)
    config = Config(width=options.width, global_batch=options.batch, wandb=WandbOptions(mode="disabled"))
    with process_group(600) as world:
        plan = make_plan(config, 1, 10 * options.batch)
        products = Products(options.width, options.batch, world.device, compute_dtype(world.device), options.square)
        median = median_seconds(options, config, plan, world, products)
        overhead = {
            "ema": seconds_of_ema(config, plan, world),
            "checkpoint": checkpoint_stall(config, plan, world, options.writing_seconds) / CHECKPOINT_EVERY,
            "between_steps": seconds_between_steps(config, world),
        }
        figures = summarise(options, median, overhead, products) | {"device": device_name(world)}
    options.tell(figures)


def median_seconds(options: Stepping, config: Config, plan: Plan, world: World, products: Products) -> dict[str, float]:
    """Return the median seconds of a step of each variant, which take turns; the products are tried in each round."""
    real = images(options.batch, world.device)
    variants: dict[str, Call] = {
        "ours": our_step(config, plan, world)[0],
        "plain": partial(PlainLoop(options.width, world.device).step, real),
        "tuned": partial(
            PlainLoop(options.width, world.device, tuned=True).step,
            real.contiguous(memory_format=torch.channels_last),
        ),
    }
    for function in variants.values():
        timed(function, world.device, WARM_UP)
    steps = {name: calls_within(function, world.device, options.turn_seconds) for name, function in variants.items()}

    def seconds(name: str) -> float:
        return timed(variants[name], world.device, steps[name]) / steps[name]

    turns: dict[str, Callable[[], float]] = {name: partial(seconds, name) for name in variants}
    found = medians(options.rounds, {"products": products.measure} | turns)
    return {name: found[name] for name in variants}


def summarise(
    options: Stepping, median: dict[str, float], overhead: dict[str, float], products: Products
) -> dict[str, float | str]:
    """Return the figures, ratios first."""
    flops = step_flops(options.width, options.batch)
    floor = flops / products.best
    return {
        "ours_over_plain": median["plain"] / median["ours"],
        "ours_over_tuned": median["tuned"] / median["ours"],
        **{f"{name}_of_floor": floor / seconds for name, seconds in median.items()},
        "loop_overhead": sum(overhead.values()) / median["ours"],
        **{f"overhead_{name}": value / median["ours"] for name, value in overhead.items()},
        **{f"{name}_images_per_second": options.batch / seconds for name, seconds in median.items()},
        "product_gflops": products.best / 1e9,
        "product_shape": products.shape,
        "step_gflop_per_image": flops / options.batch / 1e9,
        "width": options.width,
        "batch": options.batch,
        "rounds": options.rounds,
    }


def device_name(world: World) -> str:
    """Return the GPU's name, or how many threads the CPU's figures are for."""
    gpu = world.device.type == "cuda"
    return torch.cuda.get_device_name(world.device) if gpu else f"CPU, {torch.get_num_threads()} threads"


def our_step(config: Config, plan: Plan, world: World) -> tuple[Call, TrainState]:
    """Return this project's step on constant images, and the state that it trains."""
    with training_stream(world.device):
        state = TrainState(config, plan, world, 64)
        return partial(prepare_step(state, 64), constant_batch(state)), state


def seconds_of_ema(config: Config, plan: Plan, world: World) -> float:
    """Return the seconds in which the generator is averaged."""
    state = TrainState(config, plan, world, 64)
    finite = torch.isfinite(train_step(state, constant_batch(state))["grad_norm/g"])
    weight = torch.full((), 0.01, device=world.device)
    average = partial(update_ema, state.generator_ema, state.generator, weight, finite)
    return statistics.median(timed(average, world.device) for _ in range(WARM_UP))


def checkpoint_stall(config: Config, plan: Plan, world: World, seconds: float) -> float:
    """Return the seconds by which a checkpoint, copied and written beside training, holds up about `seconds` of it."""
    step, state = our_step(config, plan, world)
    timed(step, world.device, WARM_UP)
    steps = calls_within(step, world.device, seconds)
    alone = timed(step, world.device, steps)
    with tempfile.TemporaryDirectory() as folder, Saver(Path(folder), Retention(1), world.device) as saver:
        synchronize(world.device)
        started = time.perf_counter()
        saver.save(state.tensors(), state.values())
        timed(step, world.device, steps)
        beside = time.perf_counter() - started
        saver.wait()
    return max(0.0, beside - alone)


def seconds_between_steps(config: Config, world: World) -> float:
    """Return seconds a step that the real loop spends outside the step: loader, conversion, logging, stop flag.

    Runs the loop itself on rendered bedrooms. On a GPU the step returns before its work is done, so the figure is then
    that of the host alone.
    """
    stamps: list[tuple[float, float]] = []

    def prepare(state: TrainState, image_size: int) -> TakeStep:
        take_step = prepare_step(state, image_size)

        def stamped_step(real: Tensor) -> Metrics:
            started = time.perf_counter()
            metrics = take_step(real)
            stamps.append((started, time.perf_counter()))
            return metrics

        return stamped_step

    with tempfile.TemporaryDirectory() as folder:
        lmdb = write_demo(Path(folder), images=10 * config.global_batch)
        shards = Path(folder) / "shards"
        manifest = convert([LmdbSource(lmdb)], shards, workers=1)
        paths = {"data": {"path": shards}, "run_dir": Path(folder) / "run", "max_steps": LOOP_STEPS}
        config = Config.model_validate(config.model_dump(exclude={"data", "run_dir", "max_steps"}) | paths)
        plan = make_plan(config, 1, manifest.samples)
        with mock.patch.object(loop, "prepare_step", prepare), contextlib.redirect_stderr(io.StringIO()):
            loop.train_in(world, config, plan, Folder(shards), "never")
    return statistics.mean(after[0] - before[1] for before, after in pairwise(stamps))


if __name__ == "__main__":
    run(main)
