"""The study's step is the product's where they have the same factors, so that what it finds holds for the product."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_dcgan.config import make_plan
from dist_dcgan.distributed import process_group
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.stability import recipes
from tests.stability.experiment import configuration
from tests.stability.recipes import RECIPES, Recipe, Trial
from tests.stability.steps import rate_factor, scale_rates, study_step, use_differentiable_batchnorm

TRIAL = Trial("", "photos", seed=3, batch=8, steps=3)
SMALL = {name: replace(recipe, width=8) for name, recipe in RECIPES.items()}


def train(recipe: Recipe, study: bool) -> dict[str, torch.Tensor]:
    config = configuration(recipe, TRIAL, Path("unused"))
    with process_group(60, "cpu") as world:
        state = TrainState(config, make_plan(config, 1, 100), world, 64)
        if study:
            scale_rates(state, recipe)
        if recipe.r1:
            use_differentiable_batchnorm(state)
        for step in range(TRIAL.steps):
            real = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(step)) * 2 - 1
            real = real.contiguous(memory_format=torch.channels_last)
            if study:
                study_step(state, recipe, real, per_layer=True)
            else:
                train_step(state, real)
        return {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).norm() / (a[name].norm() + 1e-12)) for name in a if name.endswith("weight"))


@pytest.mark.parametrize("name", ["plain", "logits", "noise 0.3", "rate 1e-4"])
def test_the_study_computes_what_the_product_computes(name: str) -> None:
    assert distance(train(SMALL[name], study=True), train(SMALL[name], study=False)) <= 1e-6


CHANGING = [name for name in SMALL if name not in ("plain", "plain, width 64", "logits")]


@pytest.mark.parametrize("name", CHANGING)
def test_every_factor_changes_what_is_computed(name: str) -> None:
    other, changed = SMALL["logits"], SMALL[name]
    if changed.sigma_zero_at is not None:
        other, changed = replace(changed, sigma_zero_at=None), replace(changed, sigma_zero_at=2)
    if changed.l2:
        changed = replace(changed, l2=1e-2)  # 1e-5 would not be told from rounding within 3 steps
    assert distance(train(other, study=True), train(changed, study=True)) > 1e-5


def test_rates_by_fan_in_spare_the_layers_whose_fan_in_does_not_grow() -> None:
    config = configuration(Recipe(width=8), TRIAL, Path("unused"))
    with process_group(60, "cpu") as world:
        state = TrainState(config, make_plan(config, 1, 100), world, 64)
        recipe = Recipe(width=128, lr_by_fan_in="gd", lr_logit=0.1)
        factors = [
            [rate_factor(recipe, network, name, parameter) for name, parameter in network.named_parameters()]
            for network in (state.generator, state.discriminator)
        ]
    assert factors[0] == [1, 1, 1, 0.5, 1, 1, 0.5, 1, 1, 0.5, 1, 1, 0.5]
    assert factors[1] == [1, 0.5, 1, 1, 0.5, 1, 1, 0.5, 1, 1, pytest.approx(0.05)]


def test_trials_have_names_of_their_own() -> None:
    for phase in recipes.PHASES.values():
        names = [trial.name for trial in phase()]
        assert len(names) == len(set(names))
