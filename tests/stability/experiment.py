"""Trains one trial of the study, a row per step, a score every 100 steps; goes on where it was killed."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.drawing import save_grid, to_pixels
from dist_dcgan.metrics.distances import kernel_distance
from dist_dcgan.metrics.extractors import load_extractor
from dist_dcgan.metrics.features import extract, real_features
from dist_dcgan.run.checkpoint import Retention, load_newest, save_checkpoint
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.export import export_generator
from dist_dcgan.training.ema import recompute_statistics, sample_images
from dist_dcgan.training.train_state import TrainState
from shards.common.files import publish
from tests.stability.recipes import RECIPES, Recipe, Trial
from tests.stability.steps import Row, scale_rates, study_step, use_differentiable_batchnorm, use_spectral_norm
from tests.support.rows import read_rows

LAYERS_EVERY = 10
FAKES, REALS = 1000, 2000
DEAD_GRADIENT, DEAD_STEPS = 1e-3, 40


def run_trial(trial: Trial, data: Path, folder: Path) -> None:
    """Train `trial` on the shards in `data`.

    Leaves rows.jsonl and grids in `folder`, and at the end its averaged generator, as `evaluate` takes it, and `done`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[trial.recipe]
    config = configuration(recipe, trial, data)
    place = Folder(data)
    manifest, reader = place.manifest, ShardReader(place)
    plan = make_plan(config, 1, manifest.samples)
    with process_group(600, "cpu") as world:
        state = TrainState(config, plan, world, manifest.image_size)
        scale_rates(state, recipe)
        if recipe.r1 or recipe.r2:
            use_differentiable_batchnorm(state)
        if recipe.spectral:
            use_spectral_norm(state)
        resume(state, folder)
        rows = (folder / "rows.jsonl").open("a", buffering=1)
        if state.step == 0:
            write(rows, {"step": 0} | score(state, reader, world, folder))
        dead = 0
        with BatchLoader(place, config, plan, world, state.step) as batches:
            for batch in batches:
                started = time.perf_counter()
                images = to_images(batch, state.dtype)
                row = study_step(state, recipe, images, state.step % LAYERS_EVERY == 0)
                row |= {"step": state.step, "seconds": time.perf_counter() - started}
                norm = row.get("grad_norm/g", math.inf)
                dead = dead + 1 if norm < DEAD_GRADIENT or math.isnan(norm) else 0
                last = state.step == trial.steps or dead >= DEAD_STEPS
                scored = last or state.step % trial.score_every == 0
                write(rows, row | (score(state, reader, world, folder) if scored else {}))
                if scored:
                    save_checkpoint(folder / "checkpoints", state.tensors(), state.values(), Retention(1))
                if last:
                    break
        generator = RunDirectory(folder).generator
        export_generator(generator, state.generator_ema, config, manifest.image_size, state.step)
    publish(folder / "done", b"")


def configuration(recipe: Recipe, trial: Trial, data: Path) -> Config:
    """Return the product's configuration of what it has in common with the recipe."""
    return Config.model_validate(
        {
            "data": {"path": data},
            "width": recipe.width,
            "global_batch": trial.batch,
            "max_steps": trial.steps,
            "seed": trial.seed,
            "precision": trial.precision,
            "loss": recipe.loss if recipe.loss in ("logits", "sigmoid_bce") else "logits",
            "noise": {"sigma": recipe.sigma},
            "optimizer": {"lr_g": recipe.lr_g, "lr_d": recipe.lr_d, "beta2": recipe.beta2},
        }
    )


def score(state: TrainState, reader: ShardReader, world: World, folder: Path) -> Row:
    """Return the kernel distance of the averaged generator, and leave a grid of its images."""
    scorer = Scorer(reader, world)
    recompute_statistics(state.generator_ema, state.config, world.device, state.dtype)
    return scorer.kid(state.generator_ema, state.config, 36, folder / f"step-{state.step:05d}.png")


class Scorer:
    """Compares generators with real images."""

    def __init__(self, reader: ShardReader, world: World) -> None:
        self._world, self._extractor = world, load_extractor("efficientnet-lite0", None, world.device)
        self._real = real_features(reader, self._extractor, REALS, world)

    def kid(self, generator: nn.Module, config: Config, shown: int, grid: Path) -> Row:
        """Return the kernel distance of a generator in eval mode, and leave a grid of `shown` of its images."""

        def images(slots: range) -> Tensor:
            return sample_images(generator, config, slots, self._world.device)

        save_grid(images(range(shown)), grid)
        fake = extract(lambda slots: to_pixels(images(slots)), FAKES, self._extractor, self._world)
        distance = kernel_distance(self._real, fake)
        return {"kid": distance.mean, "kid_std": distance.std}


def resume(state: TrainState, folder: Path) -> None:
    """Go on from the last checkpoint; rows behind it are cut off."""
    found = load_newest(folder / "checkpoints")
    path = folder / "rows.jsonl"
    if found is None:
        path.unlink(missing_ok=True)
        return
    state.load_tensors(found.tensors)
    state.load_values(found.values)
    rows = [row for row in read_rows(path) if row["step"] <= state.step]
    publish(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write(file: Any, row: Row) -> None:
    """Append a row with four significant digits; what is not finite becomes null."""
    short = {key: float(f"{value:.4g}") if math.isfinite(value) else None for key, value in row.items()}
    file.write(json.dumps(short | {"step": int(row["step"])}) + "\n")
