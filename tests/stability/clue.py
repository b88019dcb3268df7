"""What D tells real images by in a training that fades, and what mends it: CIFAR-10 as small JPEGs.

Such JPEGs store colours at half of the resolution (4:2:0). The prediction: D has found that real images lack fine
detail in their colours, so noise moves its verdict on them; hide that detail from D, and G is well again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_dcgan.config import make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.random_streams import stream_seed
from dist_dcgan.training.ema import draw_latents
from dist_dcgan.training.train_state import TrainState
from tests.stability.experiment import configuration, resume, run_trial
from tests.stability.recipes import FASTER, RECIPES, Recipe, Trial
from tests.stability.results import FOLDER
from tests.stability.steps import halve_colour, scale_rates, study_step

MORE, LAST = 200, 50
"""Updates after a change of the recipe, and those at their end that medians are taken over."""
TRIALS = [
    Trial(f"{FASTER} at {width}", "cifar", 0, 16, steps, score_every=1_280)
    for width, steps in ((128, 5_120), (64, 5_120), (64, 6_400), (64, 10_240))
]
"""The first goes on with each change of the recipe."""
BATCHES = 12
"""Batches of each kind of image whose verdict is looked at."""
MENDED: dict[str, Mapping[str, Any]] = {
    "as before": {},
    "rate of G's last layer / 4": {"lr_image": 0.25},
    "both rates / 4": {"lr_g": 1e-4, "lr_d": 1e-4},
    "D sees colours at half of their resolution": {"half_colour": True},
    "noise of 0.05 on what D sees": {"sigma": 0.05},
}


def add_noise(images: Tensor) -> Tensor:
    """Return images with noise of 0.05, which is 6 of 255 grey levels."""
    return images + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def blur(images: Tensor) -> Tensor:
    """Return images without anything finer than 2x2 pixels."""
    return F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "noise of 0.05": add_noise,
    "colours at half of their resolution": halve_colour,
    "no colour": lambda images: images.mean(1, keepdim=True).expand_as(images),
    "nothing finer than 2x2 pixels": blur,
}


def measure(data: Path, work: Path) -> None:
    """Train what is not trained yet, and write `results/clue.jsonl`."""
    for trial in TRIALS:
        if not (work / trial.name / "done").exists():
            run_trial(trial, data, work / trial.name)
    with process_group(600, "cpu") as world, (FOLDER / "clue.jsonl").open("w", buffering=1) as file:
        for trial in TRIALS:
            for row in verdicts(trial, data, work / trial.name, world):
                file.write(json.dumps(row) + "\n")
        for name, change in MENDED.items():
            file.write(json.dumps({"then": name} | go_on(change, data, work / TRIALS[0].name, world)) + "\n")


def verdicts(trial: Trial, data: Path, folder: Path, world: World) -> Iterator[dict[str, Any]]:
    """Yield D's mean logit on real and generated images by what was changed in them."""
    recipe = RECIPES[trial.recipe]
    state = trained(recipe, trial, data, folder, world)
    with BatchLoader(Folder(data), state.config, state.plan, world, state.step) as batches:
        real = [to_images(batch, state.dtype) for batch in islice(batches, BATCHES)]
    with torch.no_grad():
        keys = [stream_seed(state.config.seed, "z", state.step + index) for index in range(BATCHES)]
        fake = [state.generator(draw_latents(state.config, key, state.slots, world.device)) for key in keys]
        for name, change in CHANGES.items():
            on_real, on_fake = (
                float(torch.cat([state.discriminator(change(images)) for images in kind]).mean())
                for kind in (real, fake)
            )
            row = {"width": recipe.width, "steps": trial.steps, "change": name}
            yield row | {"real": round(on_real, 2), "fake": round(on_fake, 2)}


def go_on(change: Mapping[str, Any], data: Path, folder: Path, world: World) -> dict[str, float]:
    """Train on at full width with a changed recipe; return G's gradient and the diversity at the end."""
    recipe = replace(RECIPES[TRIALS[0].recipe], **change)
    state = trained(recipe, TRIALS[0], data, folder, world)
    with BatchLoader(Folder(data), state.config, state.plan, world, state.step) as batches:
        rows = [study_step(state, recipe, to_images(batch, state.dtype), False) for batch in islice(batches, MORE)]
    names = ("grad_norm/g", "diversity/fake")
    return {name: float(f"{statistics.median(row[name] for row in rows[-LAST:]):.3g}") for name in names}


def trained(recipe: Recipe, trial: Trial, data: Path, folder: Path, world: World) -> TrainState:
    """Return the state at the end of a trial, with the rates of `recipe`."""
    place = Folder(data)
    config = configuration(recipe, trial._replace(steps=trial.steps + MORE), data)
    state = TrainState(config, make_plan(config, 1, place.manifest.samples), world, place.manifest.image_size)
    scale_rates(state, recipe)
    resume(state, folder)
    assert state.step == trial.steps, state.step
    return state
