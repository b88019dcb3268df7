"""Image quality at equal images and at equal wall-clock: the usual loop and this project, at both widths.

All four train on the same photographs with the same threads, one after the other and by turns, so that whatever else
the machine does meets all of them alike. Time spent scoring does not count. The usual loop has no averaged generator
and is scored by the one that it has. What has had no gradient for two turns is left where it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import Batch, BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.training.ema import recompute_statistics
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.benchmarks.plain import PlainLoop
from tests.stability.experiment import DEAD_GRADIENT, Scorer

BATCH, SEED = 32, 0
TURNS = (0, 1, 2, 5, 10, 20, 30, 40)
"""Minutes of training at which turns end and everything is scored."""
ENOUGH_STEPS = 1_000_000
WIDTHS = (64, 128)


@dataclass
class Contender:
    """Something that trains."""

    name: str
    config: Config
    batches: Iterator[Batch]
    step: Callable[[Tensor], object]
    generator: nn.Module
    shown: Callable[[], nn.Module]
    """Returns what is scored, in eval mode."""
    images: int = 0
    seconds: float = 0.0
    turns_without_gradient: int = 0

    def train(self, minutes: float) -> None:
        """Go on until so many minutes have been trained."""
        self.generator.train()
        while self.seconds < 60 * minutes:
            started = time.perf_counter()
            self.step(to_images(next(self.batches), torch.float32))
            self.seconds += time.perf_counter() - started
            self.images += BATCH
        norm = nn.utils.get_total_norm([p.grad for p in self.generator.parameters() if p.grad is not None])
        self.turns_without_gradient = self.turns_without_gradient + 1 if self.images and norm < DEAD_GRADIENT else 0

    def score(self, scorer: Scorer, folder: Path) -> dict[str, str | float]:
        """Return what it has come to, and leave a grid."""
        grid = folder / f"{self.name}, {self.images:06d} images.png"
        kid = scorer.kid(self.shown(), self.config, 64, grid)
        return {"name": self.name, "images": self.images, "seconds": round(self.seconds, 1), **kid}


def measure(data: Path, minutes: float, folder: Path) -> None:
    """Train all for some minutes each; leave rows of images, seconds and KID, and grids, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    place = Folder(data)
    with process_group(600, "cpu") as world, ExitStack() as stack, (folder / "rows.jsonl").open("w", 1) as rows:
        contenders = list(enter(place, world, stack))
        scorer = Scorer(ShardReader(place), world)
        for turn in (turn for turn in TURNS if turn <= minutes):
            for contender in contenders:
                if contender.turns_without_gradient < 2:
                    contender.train(turn)
                    rows.write(json.dumps(contender.score(scorer, folder)) + "\n")


def enter(place: Folder, world: World, stack: ExitStack) -> Iterator[Contender]:
    """Yield the usual loop and this project's defaults at both widths; `stack` closes their loaders."""
    for make in (usual, default):
        for width in WIDTHS:
            settings = {"width": width, "global_batch": BATCH, "max_steps": ENOUGH_STEPS, "seed": SEED}
            config = Config.model_validate(settings)
            plan = make_plan(config, 1, place.manifest.samples)
            yield make(config, stack.enter_context(BatchLoader(place, config, plan, world, 0)), world)


def usual(config: Config, batches: BatchLoader, world: World) -> Contender:
    """Return the loop that most ports have; it has no averaged generator."""
    loop = PlainLoop(config.width, world.device, config.seed)
    name = f"usual loop, width {config.width}"
    return Contender(name, config, iter(batches), loop.step, loop.generator, loop.generator.eval)


def default(config: Config, batches: BatchLoader, world: World) -> Contender:
    """Return this project's step with its defaults."""
    state = TrainState(config, batches.plan, world, 64)

    def averaged() -> nn.Module:
        recompute_statistics(state.generator_ema, config, world.device, state.dtype)
        return state.generator_ema

    name = f"this default, width {config.width}"
    return Contender(name, config, iter(batches), partial(train_step, state), state.generator, averaged)
