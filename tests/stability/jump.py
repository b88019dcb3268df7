"""How far one update of D moves its verdict: the change of its logit on the images of the step, by width and rate.

The prediction: Adam's first update changes every weight by about the rate, whatever its gradient, and all in the
direction that its inputs ask for. So a unit moves by rate times fan-in times the size of its inputs, and as fan-in
grows with the width, so does the change of the logit, in proportion to width and rate both. Rates divided by fan-in
should take the width out of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dist_dcgan.config import make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.random_streams import stream_seed
from dist_dcgan.training.ema import draw_latents
from dist_dcgan.training.train_state import TrainState
from tests.stability.experiment import configuration
from tests.stability.recipes import DOUBLED, Recipe, Trial
from tests.stability.results import FOLDER
from tests.stability.steps import discriminator_turn, scale_rates

RATES = (5e-5, 1e-4, 2e-4, 4e-4)
BATCHES = (8, 16, 64, 128)
BATCH = 32
SEEDS = range(5)
Row = dict[str, float | bool]


def measure(data: Path) -> None:
    """Write `results/jump.jsonl`."""
    with process_group(600, "cpu") as world, (FOLDER / "jump.jsonl").open("w") as file:
        for row in rows(data, world):
            file.write(json.dumps(row) + "\n")


def rows(data: Path, world: World) -> Iterator[Row]:
    """Yield a row per seed, width and rate; per rule at every width; per batch at full width."""
    for seed in SEEDS:
        for width in DOUBLED:
            for rate in RATES:
                yield row(Recipe(width=width, lr_d=rate), seed, data, world)
            yield row(Recipe(width=width, lr_by_fan_in="gd"), seed, data, world)
            yield row(Recipe(width=width, lr_logit=0.0), seed, data, world)
        for batch in BATCHES:
            yield row(Recipe(), seed, data, world, batch)


def row(recipe: Recipe, seed: int, data: Path, world: World, batch: int = BATCH) -> Row:
    """Return how far one update of D moves its logit on the real and generated images that it was updated on."""
    place = Folder(data)
    config = configuration(recipe, Trial("", "", seed, batch, 1), data)
    plan = make_plan(config, 1, place.manifest.samples)
    state = TrainState(config, plan, world, place.manifest.image_size)
    scale_rates(state, recipe)
    with BatchLoader(place, config, plan, world, 0) as batches:
        real = to_images(next(iter(batches)), state.dtype)
    with torch.no_grad():
        fake = state.generator(draw_latents(config, stream_seed(config.seed, "z", 0), state.slots, world.device))
    before = verdicts(state, real, fake)
    discriminator_turn(state, recipe, real, fake, per_layer=False)
    jump = (verdicts(state, real, fake) - before).square().mean().sqrt()
    return {
        "width": recipe.width,
        "rate": recipe.lr_d,
        "batch": batch,
        "by_fan_in": bool(recipe.lr_by_fan_in),
        "last_layer_fixed": recipe.lr_logit == 0,
        "seed": seed,
        "jump": float(f"{float(jump):.4g}"),
    }


@torch.no_grad()
def verdicts(state: TrainState, real: Tensor, fake: Tensor) -> Tensor:
    """Return D's logits, each kind of image in a batch of its own as in training."""
    return torch.cat([state.discriminator(real), state.discriminator(fake)])
