"""Features of sets of images, extracted on all ranks and gathered on rank 0."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dist_dcgan.data.order import Indices
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.distributed.collectives import from_rank_zero
from dist_dcgan.distributed.world import World
from dist_dcgan.metrics.extractors import Extractor
from dist_dcgan.random_streams import permutation, stream_seed
from shards.common.errors import OneRankError, UserError
from shards.common.files import name_of, open_plain, publish, remove_leftovers
from shards.common.messages import warn
from shards.common.progress import Progress

_ORPHANED_SECONDS = 3600.0  # other runs may be writing the same features

Images: TypeAlias = Callable[[range], Tensor]
"""Returns the images at the given positions of a set, uint8 (N, 3, size, size) on any device."""


def extract(images: Images, count: int, extractor: Extractor, world: World, label: str = "") -> Tensor:
    """Return features of the first `count` images, float32 (count, D) on the CPU; (0, D) on ranks other than 0.

    Every rank calls it and extracts a contiguous share. They gather each batch over `World.slow_group`, as a rank may
    have to fetch or check many shards for it. If there is a `label`, rank 0 shows progress on a terminal.
    """
    share = -(-count // world.world_size)
    mine = range(min(world.rank * share, count), min((world.rank + 1) * share, count))
    shares = torch.zeros(world.world_size if world.is_main else 0, share, extractor.dimensions)
    with Progress(count, label, shown=bool(label) and world.is_main and sys.stderr.isatty()) as progress:
        for first in range(0, share, extractor.batch):
            part = mine[first : first + extractor.batch]
            features = torch.zeros(min(extractor.batch, share - first), extractor.dimensions)
            if part:
                features[: len(part)] = extractor.features(images(part).to(world.device)).cpu()
            received = [gathered[first : first + len(features)] for gathered in shares]
            if world.world_size == 1:
                received[0].copy_(features)
            else:
                dist.gather(features, received or None, group=world.slow_group)
            progress.advance(min(len(features) * world.world_size, count - first * world.world_size))
    return shares.flatten(0, 1)[:count]


def real_features(reader: ShardReader, extractor: Extractor, count: int, world: World, label: str = "") -> Tensor:
    """Return features of `count` images of a data set (all if it has fewer) as `extract` does.

    The images depend only on the data set and the count. Rank 0 caches the result in a file named by the data set's
    digest, the extractor and the count.
    """
    chosen = scored_samples(reader, count)
    path = _cache_file(reader, extractor, len(chosen))
    cached: list[Tensor] = []  # on rank 0 only: too much to send to ranks that do not need it

    def look() -> bool:
        cached.extend(_read_cache(path, (len(chosen), extractor.dimensions)))
        return bool(cached)

    if from_rank_zero(look, world.slow_group):
        return cached[0] if cached else torch.empty(0, extractor.dimensions)

    def read(places: range) -> Tensor:
        try:
            return read_images(reader, chosen[places.start : places.stop])
        except UserError as error:  # only this rank reads the damaged shard, so it must report it
            raise OneRankError(f"{world}: {error}") from error

    features = extract(read, len(chosen), extractor, world, label)
    if world.is_main:
        _write_cache(path, features)
    return features


def scored_samples(reader: ShardReader, count: int) -> Indices:
    """Return the samples of a data set that scores use: a random choice, the same in every run."""
    order = permutation(stream_seed(0, "scored samples", 0), reader.manifest.samples)[:count]
    return np.sort(order.numpy())


def read_images(reader: ShardReader, samples: Indices) -> Tensor:
    """Return images of a data set as uint8 (N, 3, size, size)."""
    size = reader.manifest.image_size
    pixels = np.empty((len(samples), size, size, 3), dtype=np.uint8)
    reader.gather(samples, pixels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def beside_nearest(images: Tensor, fake: Tensor, real: Tensor, reader: ShardReader, count: int) -> Tensor:
    """Return rows of an image and its `count` nearest real images, uint8 (len(images) * (1 + count), 3, size, size).

    `fake` are the features of the images, `real` those of `scored_samples(reader, len(real))`.
    """
    samples = scored_samples(reader, len(real))
    nearest = torch.cdist(fake, real).topk(count, largest=False).indices
    rows = [
        torch.cat([image[None], read_images(reader, samples[found.numpy()])])
        for image, found in zip(images, nearest, strict=True)
    ]
    return torch.cat(rows)


def _cache_file(reader: ShardReader, extractor: Extractor, count: int) -> Path | None:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # this user has no home
        return None
    identity = f"{reader.manifest.digest()[:16]}-{extractor.name}-{extractor.weights_sha256[:16]}-{count}"
    return Path(home) / "dist_dcgan" / f"features-{identity}.safetensors"


def _read_cache(path: Path | None, shape: tuple[int, int]) -> list[Tensor]:
    """Return the cached features, an empty list if the file is missing or damaged."""
    if path is None:
        return []
    try:
        with open_plain(path) as file:
            features = load_file(name_of(file))["features"]
    except FileNotFoundError:
        return []
    except (OSError, KeyError, SafetensorError) as error:
        warn(f"{path} is extracted anew: {error}")
        return []
    return [features] if features.shape == shape else []


def _write_cache(path: Path | None, features: Tensor) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name.__eq__, _ORPHANED_SECONDS)
        publish(path, save({"features": features}))
    except OSError as error:  # a full or read-only home only makes the next score slower
        warn(f"features are not cached: {error}")
