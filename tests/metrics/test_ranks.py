"""Features do not depend on the number of ranks, and rank 0 alone holds them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World, process_group
from dist_dcgan.metrics.extractors import Extractor
from dist_dcgan.metrics.features import extract, read_images, real_features, scored_samples
from tests.support.ranks import run_ranks

COUNTS = (7, 2)
REALS = 31
RANKS = [1, pytest.param(2, marks=pytest.mark.slow), 3]

Mosaics = Callable[[Tensor], Tensor]


class Share(NamedTuple):
    """What a rank was asked for, in order, and the features that it was given."""

    places: list[int]
    features: np.ndarray


def mosaic_extractor(features: Mosaics | None = None, **changes: Any) -> Extractor:
    """A stand-in without weights: the means of 2x2 tiles of each color, three images at a time."""
    usual = Extractor("mosaic", "0" * 64, resize="none", dimensions=12, batch=3, features=features or mosaics)
    return replace(usual, **changes)


def mosaics(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def numbered_images(places: range) -> Tensor:
    """Images that are functions of their place alone."""
    images = [
        torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(place), dtype=torch.uint8)
        for place in places
    ]
    return torch.stack(images)


def shares_of_rank(data: Path, homes: Path) -> dict[str, Share]:
    """Extract numbered images, then those of a data set, once without a cache and once with."""
    with process_group(60, "cpu") as world:
        # Each rank has a cache of its own, as on machines without a common home.
        os.environ["XDG_CACHE_HOME"] = str(homes / f"rank{world.rank}")
        shares = {f"{count} numbered": share_of_numbered(count, world) for count in COUNTS}
        return shares | {name: share_of_real(data, world) for name in ("real", "real, cached")}


def share_of_numbered(count: int, world: World) -> Share:
    places: list[int] = []

    def images(part: range) -> Tensor:
        places.extend(part)
        return numbered_images(part)

    return Share(places, extract(images, count, mosaic_extractor(), world).numpy())


def share_of_real(data: Path, world: World) -> Share:
    reader = ShardReader(Folder(data))
    samples = scored_samples(reader, REALS)
    means = mosaics(read_images(reader, samples))
    places: list[int] = []

    def places_and_mosaics(images: Tensor) -> Tensor:
        features = mosaics(images)
        places.extend(torch.cdist(features, means).argmin(dim=1).tolist())
        return features

    return Share(places, real_features(reader, mosaic_extractor(places_and_mosaics), REALS, world).numpy())


@pytest.fixture(scope="module", params=RANKS)
def ranks(
    request: pytest.FixtureRequest, demo_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Share]]:
    """What each of 1, 2 and 3 ranks extracts."""
    homes = tmp_path_factory.mktemp("homes")
    shares = run_ranks(request.param, shares_of_rank, demo_shards, homes)
    assert [home.name for home in homes.iterdir()] == ["rank0"]
    return shares


@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_ranks_extracts_the_same_features_in_the_same_order(
    ranks: list[dict[str, Share]], count: int
) -> None:
    expected = mosaics(numbered_images(range(count))).numpy()
    assert len(np.unique(expected, axis=0)) == count
    shares = [share[f"{count} numbered"] for share in ranks]
    check(shares, expected)
    assert [place for share in shares for place in share.places] == list(range(count))
    assert max(len(share.places) for share in shares) == -(-count // len(ranks))


def test_features_of_a_data_set_are_those_of_one_process_and_rank_zeros_cache_serves_all(
    ranks: list[dict[str, Share]], demo_shards: Path
) -> None:
    reader = ShardReader(Folder(demo_shards))
    expected = mosaics(read_images(reader, scored_samples(reader, REALS))).numpy()
    for name in ("real", "real, cached"):
        check([share[name] for share in ranks], expected)
    assert [place for share in ranks for place in share["real"].places] == list(range(REALS))
    assert [share["real, cached"].places for share in ranks] == [[]] * len(ranks)


@pytest.mark.parametrize(
    ("terminal", "rank", "label"), [(True, 0, "x"), (False, 0, "x"), (True, 1, "x"), (True, 0, "")]
)
def test_progress_is_shown_by_rank_zero_on_a_terminal_if_it_is_asked_for(
    terminal: bool, rank: int, label: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("torch.distributed.gather", lambda *_, **__: None)
    for world_size, count in ((2, 7), (1 + rank, 8)):
        extract(numbered_images, count, mosaic_extractor(), World(rank, rank, world_size, torch.device("cpu")), label)
        said = capsys.readouterr().err
        if terminal and rank == 0 and label:
            assert said.split("\r")[-1].startswith("x: 100%|") and f"| {count}/{count} [" in said
        else:
            assert said == ""


def check(shares: list[Share], expected: np.ndarray) -> None:
    """Rank 0 holds the features and the others none."""
    np.testing.assert_array_equal(shares[0].features, expected)
    assert [share.features.shape for share in shares[1:]] == [(0, 12)] * (len(shares) - 1)
