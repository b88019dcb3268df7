"""Image quality at equal images and at equal wall-clock: the usual loop and this project, at both widths.

Each runs for the same time with all cores, one after the other, on the same photographs. Time spent scoring does not
count. The usual loop has no averaged generator and is scored by the one that it has.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.places import Folder
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed import World, process_group
from dist_dcgan.metrics.distances import kernel_distance
from dist_dcgan.metrics.extractors import load_extractor
from dist_dcgan.metrics.features import extract, real_features, to_pixels
from dist_dcgan.training.ema import recompute_statistics, sample_images
from dist_dcgan.training.loggers import save_grid
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from shards.files import publish
from tests.benchmarks.step import PlainLoop

BATCH, SEED = 32, 0
FAKES, REALS = 1000, 2000
SCORE_EVERY_MINUTES = 4
ENOUGH_STEPS = 1_000_000
NAMES = ("plain, width 64", "plain, width 128", "default, width 64", "default, width 128")


class Contender(NamedTuple):
    """Something that trains."""

    step: Callable[[Tensor], object]
    generator: Callable[[], nn.Module]
    """Returns what is scored, in eval mode."""


def measure(name: str, data: Path, minutes: float, folder: Path) -> None:
    """Train `name` for some minutes; leave rows of images, seconds and KID, and grids, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(', ', '_').replace(' ', '_')}.jsonl"
    if path.exists():
        return
    kind, width = name.split(", width ")
    config = Config.model_validate(
        {"width": int(width), "global_batch": BATCH, "max_steps": ENOUGH_STEPS, "seed": SEED}
    )
    place = Folder(data)
    reader = ShardReader(place)
    with process_group(600, "cpu") as world:
        plan = make_plan(config, 1, place.manifest.samples)
        contender = plain(config, world) if kind == "plain" else default(config, world)
        with BatchLoader(place, config, plan, world, 0) as batches:
            rows = list(scored(contender, batches, config, world, reader, minutes, path.with_suffix("")))
    publish(path, "".join(json.dumps({"name": name} | row) + "\n" for row in rows).encode())


def plain(config: Config, world: World) -> Contender:
    """Return the usual loop."""
    loop = PlainLoop(config.width, world.device, config.seed)
    return Contender(lambda real: loop.step(real.contiguous()), lambda: loop.generator.eval())


def default(config: Config, world: World) -> Contender:
    """Return this project's step with its defaults."""
    state = TrainState(config, make_plan(config, 1, BATCH), world, 64)

    def averaged() -> nn.Module:
        recompute_statistics(state.generator_ema, config, world.device, state.dtype)
        return state.generator_ema

    return Contender(lambda real: train_step(state, real), averaged)


def scored(
    contender: Contender,
    batches: BatchLoader,
    config: Config,
    world: World,
    reader: ShardReader,
    minutes: float,
    grids: Path,
) -> Iterator[dict[str, float]]:
    """Train, and yield a row at the start, every few minutes, and at the end."""
    extractor = load_extractor("efficientnet-lite0", None, world.device)
    real = real_features(reader, extractor, REALS, world)
    seconds, images, due = 0.0, 0, 0.0
    for batch in batches:
        if seconds >= due:
            due += 60 * SCORE_EVERY_MINUTES
            generator = contender.generator()

            def draw(slots: range, generator: nn.Module = generator) -> Tensor:
                return sample_images(generator, config, slots, world.device)

            distance = kernel_distance(real, extract(lambda slots: to_pixels(draw(slots)), FAKES, extractor, world))
            save_grid(draw(range(64)), grids.with_name(f"{grids.name}_{images:06d}.png"))
            generator.train()
            yield {"images": images, "seconds": seconds, "kid": distance.mean, "kid_std": distance.std}
            if seconds >= 60 * minutes:
                return
        started = time.perf_counter()
        contender.step(to_images(batch, torch.float32))
        seconds += time.perf_counter() - started
        images += BATCH
