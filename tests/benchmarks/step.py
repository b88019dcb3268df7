"""Times the training step against the usual DCGAN loop and against the machine's matrix-product floor.

    python -m tests.benchmarks.step [--width 128] [--batch 32] [--rounds 5] [--json FILE]

All in one run, taking turns, so that the ratios hold on a noisy machine. "Plain" is the loop that most ports have:
sigmoid and BCELoss, weight gradients of D in G's turn, contiguous layout, unfused Adam, torch's own batch norm, no
noise, no EMA. The floor is the time of the step's floating-point operations at the rate of a large matrix product.
"""

from __future__ import annotations

import contextlib
import io
import json
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
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_dcgan.config import Config, Plan, WandbOptions, make_plan
from dist_dcgan.data.places import Folder
from dist_dcgan.distributed import World, process_group
from dist_dcgan.models.networks import Discriminator, Generator, init_weights
from dist_dcgan.training import loop
from dist_dcgan.training.checkpoint import Retention, save_checkpoint
from dist_dcgan.training.ema import update_ema
from dist_dcgan.training.steps import Metrics, train_step
from dist_dcgan.training.train_state import TrainState
from shards.command_line import Options, build, parse_flags, run
from shards.convert import convert
from shards.demo import write_demo
from shards.sources.lmdb_source import LmdbSource

MATRIX = 2048
WARM_UP = 2
CHECKPOINT_EVERY = 1000
LOOP_STEPS = 12


class Benchmark(Options):
    """Time the training step."""

    width: int = Field(128, ge=1)
    """Channels of the last hidden layer."""
    batch: int = Field(32, ge=2)
    """Images per step."""
    rounds: int = Field(5, ge=1)
    """Rounds in which all variants take a turn."""
    json_: Path | None = Field(None, alias="json")
    """File for the figures, by name."""


def main(argv: Sequence[str]) -> None:
    """Run the rounds and print the medians."""
    options = build(Benchmark, parse_flags(Benchmark, argv, "python -m tests.benchmarks.step"))
    config = Config(width=options.width, global_batch=options.batch, wandb=WandbOptions(mode="disabled"))
    with process_group(600) as world:
        plan = make_plan(config, 1, 10 * options.batch)
        variants = {
            "ours": our_step(config, plan, world),
            "plain": partial(PlainLoop(options.width, world.device).step, images(options.batch, world.device)),
            "product": matrix_product(world.device),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_ in range(WARM_UP + options.rounds):
            for name, function in variants.items():
                elapsed = timed(function, world.device)
                if round_ >= WARM_UP:
                    seconds[name].append(elapsed)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        overhead = loop_seconds(config, plan, world) | {"between_steps": seconds_between_steps(config, world)}
        figures = summarise(options, median, overhead, step_flops(options.width, options.batch))
        gpu = world.device.type == "cuda"
        figures["device"] = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    for name, value in figures.items():
        print(f"{name:28} {value if isinstance(value, str) else f'{value:.4g}'}")
    if options.json_ is not None:
        options.json_.write_text(json.dumps(figures, indent=1) + "\n")


def summarise(
    options: Benchmark, median: dict[str, float], overhead: dict[str, float], flops: float
) -> dict[str, float | str]:
    """Return the figures, ratios first."""
    rate = 2 * MATRIX**3 / median["product"]
    floor = flops / rate
    return {
        "ours_over_plain": median["plain"] / median["ours"],
        "ours_of_floor": floor / median["ours"],
        "plain_of_floor": floor / median["plain"],
        "loop_overhead": sum(overhead.values()) / median["ours"],
        **{f"overhead_{name}": value / median["ours"] for name, value in overhead.items()},
        "ours_images_per_second": options.batch / median["ours"],
        "plain_images_per_second": options.batch / median["plain"],
        "product_gflops": rate / 1e9,
        "step_gflop_per_image": flops / options.batch / 1e9,
        "width": options.width,
        "batch": options.batch,
        "rounds": options.rounds,
    }


def our_step(config: Config, plan: Plan, world: World) -> Callable[[], object]:
    """Return this project's step on constant images."""
    state = TrainState(config, plan, world, 64)
    real = images(plan.global_batch, world.device).contiguous(memory_format=torch.channels_last)
    return lambda: train_step(state, real)


class PlainLoop:
    """The step that most ports have: contiguous layout, sigmoid and BCELoss, unfused Adam."""

    def __init__(self, width: int, device: torch.device, seed: int = 0) -> None:
        self.generator = Generator(width).to(device)
        self.discriminator = nn.Sequential(Discriminator(width), nn.Sigmoid()).to(device)
        for network in (self.generator, self.discriminator):
            init_weights(network, torch.Generator().manual_seed(seed))
        self._optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=False)
        self._optimizer_d = torch.optim.Adam(
            self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999), foreach=False
        )
        self._criterion = nn.BCELoss()

    def step(self, real: Tensor) -> None:
        """Update both networks on `real`."""
        ones, zeros = torch.ones(len(real), device=real.device), torch.zeros(len(real), device=real.device)
        self.discriminator.zero_grad()
        self._criterion(self.discriminator(real), ones).backward()
        fake = self.generator(torch.randn(len(real), 100, device=real.device))
        self._criterion(self.discriminator(fake.detach()), zeros).backward()
        self._optimizer_d.step()
        self.generator.zero_grad()
        self._criterion(self.discriminator(fake), ones).backward()
        self._optimizer_g.step()


def matrix_product(device: torch.device) -> Callable[[], object]:
    """Return a large matrix product, in bf16 on a GPU as training is."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, MATRIX, MATRIX, device=device, dtype=dtype)
    return lambda: a @ b


def loop_seconds(config: Config, plan: Plan, world: World) -> dict[str, float]:
    """Return seconds a step that EMA and checkpoints cost, each by itself."""
    state = TrainState(config, plan, world, 64)
    real = images(plan.global_batch, world.device).contiguous(memory_format=torch.channels_last)
    finite = torch.isfinite(train_step(state, real)["grad_norm/g"])
    weight = torch.full((), 0.01, device=world.device)
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "ema": (lambda: update_ema(state.generator_ema, state.generator, weight, finite), 1),
            "checkpoint": (
                lambda: save_checkpoint(Path(folder), state.tensors(), state.values(), Retention(1)),
                CHECKPOINT_EVERY,
            ),
        }
        return {
            name: statistics.median(timed(function, world.device) for _ in range(3)) / every
            for name, (function, every) in parts.items()
        }


def seconds_between_steps(config: Config, world: World) -> float:
    """Return seconds a step that the real loop spends outside the step: loader, conversion, logging, stop flag.

    Runs the loop itself on rendered bedrooms. On a GPU the step returns before its work is done, so the figure is then
    that of the host alone.
    """
    stamps: list[tuple[float, float]] = []

    def stamped_step(state: TrainState, real: Tensor) -> Metrics:
        started = time.perf_counter()
        metrics = train_step(state, real)
        stamps.append((started, time.perf_counter()))
        return metrics

    with tempfile.TemporaryDirectory() as folder:
        lmdb = write_demo(Path(folder), images=10 * config.global_batch)
        manifest = convert([LmdbSource(lmdb)], Path(folder) / "shards", workers=1)
        paths = {"data": {"path": Path(folder) / "shards"}, "run_dir": Path(folder) / "run", "max_steps": LOOP_STEPS}
        config = Config.model_validate(config.model_dump(exclude={"data", "run_dir", "max_steps"}) | paths)
        plan = make_plan(config, 1, manifest.samples)
        with mock.patch.object(loop, "train_step", stamped_step), contextlib.redirect_stderr(io.StringIO()):
            loop.train_in(world, config, plan, Folder(config.data.path), "never")
    real_steps = stamps[1:]  # the first is the dry step
    return statistics.mean(after[0] - before[1] for before, after in pairwise(real_steps))


def step_flops(width: int, batch: int) -> float:
    """Return the floating-point operations of a step with D frozen in G's turn, counted on the meta device."""
    with torch.device("meta"):
        generator, discriminator = Generator(width), Discriminator(width)
        real, z = torch.empty(batch, 3, 64, 64), torch.empty(batch, 100)
    with FlopCounterMode(display=False) as counter:
        fake = generator(z)
        discriminator(real).sum().backward()
        discriminator(fake.detach()).sum().backward()
        discriminator.requires_grad_(False)
        discriminator(fake).sum().backward()
    return float(counter.get_total_flops())


def images(batch: int, device: torch.device) -> Tensor:
    """Return images of noise in [-1, 1]."""
    return torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, the device's work included."""
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run(main)
