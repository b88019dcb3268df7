"""The study's step is the product's where they have the same factors, so that what it finds holds for the product."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from PIL import Image

from dist_dcgan.config import make_plan
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import process_group
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.export import read_description
from dist_dcgan.training.steps import train_step
from dist_dcgan.training.train_state import TrainState
from tests.stability import clue, experiment, jpegs, long, recipes, report, results
from tests.stability.experiment import configuration
from tests.stability.recipes import PHASES, RECIPES, Recipe, Trial
from tests.stability.steps import (
    halve_colour,
    rate_factor,
    scale_rates,
    study_step,
    use_differentiable_batchnorm,
    use_spectral_norm,
)
from tests.support.rows import read_rows

TRIAL = Trial("", "photos", seed=3, batch=8, steps=3)
SMALL = {name: replace(recipe, width=8) for name, recipe in RECIPES.items()}


def others(*values: str) -> list[ParameterSet]:
    """Values that are left to --all."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def train(recipe: Recipe, study: bool, trial: Trial = TRIAL) -> dict[str, torch.Tensor]:
    config = configuration(recipe, trial, Path("unused"))
    with process_group(60, "cpu") as world:
        state = TrainState(config, make_plan(config, 1, 100), world, 64)
        if study:
            scale_rates(state, recipe)
        if recipe.r1 or recipe.r2:
            use_differentiable_batchnorm(state)
        if recipe.spectral:
            use_spectral_norm(state)
        for step in range(TRIAL.steps):
            real = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(step)) * 2 - 1
            real = real.contiguous(memory_format=torch.channels_last)
            if study:
                study_step(state, recipe, real, per_layer=True)
            else:
                train_step(state, real)
        return {name: tensor.detach().clone() for name, tensor in state.tensors().items()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(
        float((a[name] - b[name]).norm() / (a[name].norm() + 1e-12))
        for name in a.keys() & b.keys()
        if name.endswith("weight")
    )


@pytest.mark.parametrize("name", ["logits", *others("plain", "noise 0.3", "rate 1e-4")])
@pytest.mark.parametrize("precision", ["fp32", *others("bf16")])
def test_the_study_computes_what_the_product_computes(name: str, precision: Literal["fp32", "bf16"]) -> None:
    trial = TRIAL._replace(precision=precision)
    assert distance(train(SMALL[name], True, trial), train(SMALL[name], False, trial)) <= 1e-6


SAME = ("plain", "plain, width 64", "logits")  # the plain loss has the same numbers until it collapses
DIFFERENT = {recipe: name for name, recipe in reversed(SMALL.items()) if name not in SAME and recipe != SMALL["logits"]}
CHANGING = ["noise 0.1", *others(*(name for name in reversed(DIFFERENT.values()) if name != "noise 0.1"))]


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
        recipe = Recipe(width=128, lr_by_fan_in="gd", lr_logit=0.1, lr_image=0.25)
        factors = [
            [rate_factor(recipe, network, name, parameter) for name, parameter in network.named_parameters()]
            for network in (state.generator, state.discriminator)
        ]
    assert factors[0] == [1, 1, 1, 0.5, 1, 1, 0.5, 1, 1, 0.5, 1, 1, 0.125]
    assert factors[1] == [1, 0.5, 1, 1, 0.5, 1, 1, 0.5, 1, 1, pytest.approx(0.05)]


def test_colours_of_half_resolution_are_those_of_a_jpeg() -> None:
    """Most of what JPEG of the best quality changes is that; it weighs the three colours otherwise."""
    image = np.random.default_rng(0).integers(60, 196, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=100, subsampling="4:2:0")
    original, stored = (
        torch.tensor(np.array(pixels)).permute(2, 0, 1)[None] / 127.5 - 1 for pixels in (image, Image.open(file))
    )
    halved = halve_colour(original)
    assert torch.allclose(halved.mean(1), original.mean(1), atol=1e-6)
    assert float((halved - stored).std()) < 0.5 * float((original - stored).std())


def test_trials_have_names_of_their_own() -> None:
    trials = {trial for phase in PHASES.values() for trial in phase()}  # two phases may share one
    assert len({trial.name for trial in trials}) == len(trials)


@pytest.fixture
def small_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe is narrow, and scored with few images."""
    for name in ("FAKES", "REALS"):
        monkeypatch.setattr(experiment, name, 8)
    for name, recipe in SMALL.items():
        monkeypatch.setitem(RECIPES, name, recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.usefixtures("small_trials")
def test_a_trial_that_was_killed_goes_on_as_if_it_had_not(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial("noise 0.1", "rooms", 0, 8, 10, score_every=4)
    experiment.run_trial(trial, demo_shards, tmp_path / "whole")

    def killed(state: TrainState, *arguments: Any) -> dict[str, float]:
        if state.step == 6:
            raise KeyboardInterrupt
        return study_step(state, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "study_step", killed)
        experiment.run_trial(trial, demo_shards, tmp_path / "killed")
    assert not (tmp_path / "killed" / "done").exists()
    experiment.run_trial(trial, demo_shards, tmp_path / "killed")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole") if "kid" in row] == [0, 4, 8, 10]
    killed_generator, whole_generator = (RunDirectory(tmp_path / name).generator for name in ("killed", "whole"))
    assert read_description(killed_generator) == read_description(whole_generator)
    assert read_description(whole_generator)["step"] == 10


@pytest.mark.slow
@pytest.mark.usefixtures("small_trials")
def test_the_clue_is_looked_for_after_a_training(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D sees every change of the images, and each change of the recipe leads to other numbers."""
    trials = [Trial("logits", "rooms", 0, 8, 3, score_every=3)]
    for name, setting in {"MORE": 12, "LAST": 1, "TRIALS": trials, "FOLDER": tmp_path}.items():
        monkeypatch.setattr(clue, name, setting)
    clue.measure(demo_shards, tmp_path / "work")
    found = read_rows(tmp_path / "clue.jsonl")
    assert len({(row["real"], row["fake"]) for row in found if "change" in row}) == len(clue.CHANGES)
    assert len({row["grad_norm/g"] for row in found if "then" in row}) == len(clue.MENDED)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder / "rows.jsonl")]


def test_the_tables_of_the_study_are_those_of_its_results() -> None:
    text = report.README.read_text()
    assert report.with_tables(text) == text


def test_the_watchdog_names_the_literal_paper_in_the_results_and_no_default() -> None:
    found = [result for phase in report.TRIAL_PHASES for result in results.read(phase)]
    plain = [result for result in found if result.trial.recipe == "plain"]
    assert plain
    for result in plain:
        collapse, *_ = result.collapses()
        assert collapse.rule.mode == "the discriminator has won"
        dead = next(row["step"] for row in result.rows() if row["grad_norm/g"] < 1e-2)
        assert collapse.step <= dead + 20
    healthy = [result for result in found if result.trial.recipe == "plain, width 64"]
    assert healthy and not any(result.collapses() for result in healthy)


def test_a_result_replaces_an_earlier_one_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    run = long.LongRun("photos", "paper", 1, 128, 2e-4, "bf16", "CPU")
    long.keep(path, run, run._asdict() | {"images": 100})
    long.keep(path, run._replace(seed=2), run._replace(seed=2)._asdict() | {"images": 100})
    long.keep(path, run, run._asdict() | {"images": 200})
    assert [(row["seed"], row["images"]) for row in read_rows(path)] == [(2, 100), (1, 200)]


@pytest.mark.slow
def test_a_long_run_that_fails_leaves_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = long.Places(tmp_path / "missing", None, tmp_path / "work", tmp_path / "long.jsonl")
    run = long.LongRun("photos", "narrow", 1, 32, 2e-4, "fp32", "CPU")
    long.measure(places, [run], 64, 32, 1, 600)
    assert f"{run.name} ended with status 2" in capsys.readouterr().out
    assert not places.results.exists()


@pytest.mark.parametrize("phase", sorted(PHASES))
def test_what_is_gathered_is_added_to_what_is_there(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = (results.FOLDER / f"{phase}.jsonl").read_text()
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    (tmp_path / f"{phase}.jsonl").write_text(there)
    assert results.gather(phase, tmp_path / "nothing") == (0, {})
    assert sorted((tmp_path / f"{phase}.jsonl").read_text().splitlines()) == sorted(there.splitlines())
    trial = PHASES[phase]()[-1]
    folder = tmp_path / "work" / trial.name
    folder.mkdir(parents=True)
    for name in ("done", "step-00011.png"):
        (folder / name).touch()
    row = dict.fromkeys([*results.MEDIANS, "kid", "seconds", "loss/g", "logit/fake", "logit/fake_updated"], 0.5)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in range(1, 12)))
    assert results.gather(phase, tmp_path / "work") == (1, {})  # other pictures lie elsewhere
    assert json.loads((tmp_path / f"{phase}.jsonl").read_text().splitlines()[-1])["trial"] == trial._asdict()
    assert trial in results.kept(phase) and len(results.kept(phase)) >= len(there.splitlines())


def test_small_jpegs_show_the_same_images_in_the_same_order_with_their_colours_as_told(
    demo_shards: Path, tmp_path: Path
) -> None:
    detail = {}
    for colours in recipes.JPEGS.values():
        jpegs.store(demo_shards, tmp_path / colours, colours)
        before, after = (pixels_of(folder) for folder in (demo_shards, tmp_path / colours))
        assert np.abs(after - before).mean() < 0.25 * np.abs(after - before[::-1]).mean()
        colour = after[..., 0] - after[..., 1]
        coarse = colour.reshape(len(colour), 32, 2, 32, 2).mean((2, 4)).repeat(2, 1).repeat(2, 2)
        detail[colours] = float((colour - coarse).std())
    assert detail["4:2:0"] < 0.75 * detail["4:4:4"]  # libjpeg interpolates


def pixels_of(shards: Path) -> np.ndarray:
    place = Folder(shards)
    pixels = np.empty((place.manifest.samples, 64, 64, 3), np.uint8)
    ShardReader(place).gather(np.arange(len(pixels)), pixels)
    return pixels.astype(float)


def test_the_interval_is_that_of_welch() -> None:
    """As scipy's `ttest_ind(equal_var=False)` gives it."""
    assert long.welch([1, 2, 3], [2, 3, 5]) == pytest.approx((-4.45422, 1.78755), rel=1e-4)
    for degrees, quantile in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423)):
        assert long._student(degrees) == pytest.approx(quantile, rel=1e-3)
