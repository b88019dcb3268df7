"""Features do not depend on the number of ranks, and rank 0 alone holds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed import process_group
from dist_dcgan.metrics.extractors import Extractor
from dist_dcgan.metrics.features import extract, read_images, real_features, scored_samples
from shards.manifest import read_manifest
from tests.ranks import run_ranks

Mosaics = Callable[[Tensor], Tensor]


class Share(NamedTuple):
    """What a rank was asked for and what it was given."""

    places: list[int]
    images: int
    features: np.ndarray


def mosaic_extractor(features: Mosaics | None = None, **changes: object) -> Extractor:
    """A stand-in without weights: the means of 2x2 tiles of each color, three images at a time."""
    facts = {"name": "mosaic", "weights_sha256": "0" * 64, "resize": "none", "dimensions": 12, "batch": 3}
    return Extractor(**(facts | changes), features=features or mosaics)


def mosaics(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def numbered_images(places: range) -> Tensor:
    """Images that are functions of their place alone."""
    images = [
        torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(place), dtype=torch.uint8)
        for place in places
    ]
    return torch.stack(images)


def share_of_numbered(count: int) -> Share:
    places: list[int] = []

    def images(part: range) -> Tensor:
        places.extend(part)
        return numbered_images(part)

    with process_group(60, "cpu") as world:
        features = extract(images, count, mosaic_extractor(), world)
    return Share(places, len(places), features.numpy())


def share_of_real(data: Path, count: int, homes: Path) -> Share:
    """Each rank has a cache of its own, as on machines without a common home."""
    extracted: list[Tensor] = []

    def counted(images: Tensor) -> Tensor:
        extracted.extend(images)
        return mosaics(images)

    with process_group(60, "cpu") as world:
        os.environ["XDG_CACHE_HOME"] = str(homes / f"rank{world.rank}")
        features = real_features(ShardReader(data, read_manifest(data)), mosaic_extractor(counted), count, world)
    return Share([], len(extracted), features.numpy())


@pytest.mark.parametrize("count", [7, 2])
def test_any_number_of_ranks_extracts_the_same_features_in_the_same_order(count: int) -> None:
    expected = mosaics(numbered_images(range(count))).numpy()
    assert len(np.unique(expected, axis=0)) == count
    for world_size in (1, 2, 3):
        shares = run_ranks(world_size, share_of_numbered, count)
        assert [place for share in shares for place in share.places] == list(range(count))
        assert max(share.images for share in shares) == -(-count // world_size)
        np.testing.assert_array_equal(shares[0].features, expected)
        assert [share.features.shape for share in shares[1:]] == [(0, 12)] * (world_size - 1)


def test_real_features_are_the_same_extracted_by_any_ranks_and_from_the_cache_of_rank_zero(
    demo_shards: Path, tmp_path: Path
) -> None:
    count = 31
    reader = ShardReader(demo_shards, read_manifest(demo_shards))
    expected = mosaics(read_images(reader, scored_samples(reader, count))).numpy()
    for world_size, images in ((1, [31]), (2, [16, 15]), (3, [11, 11, 9])):
        homes = tmp_path / f"{world_size} ranks"
        for wanted in (images, [0] * world_size):  # the second time rank 0 finds its cache, the others have none
            shares = run_ranks(world_size, share_of_real, demo_shards, count, homes)
            assert [share.images for share in shares] == wanted
            np.testing.assert_array_equal(shares[0].features, expected)
            assert [share.features.shape for share in shares[1:]] == [(0, 12)] * (world_size - 1)
        assert [home.name for home in homes.iterdir()] == ["rank0"]
