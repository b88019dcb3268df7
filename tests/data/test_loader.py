"""Pixels come from the place that the manifest gives, or not at all."""

from __future__ import annotations

import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data import reader as reader_module
from dist_dcgan.data.loader import Batch, BatchLoader, flip, to_images
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.world import World
from dist_dcgan.random_streams import stream_seed
from shards.common.errors import UserError

CPU = torch.device("cpu")


def gather(reader: ShardReader, samples: list[int]) -> np.ndarray:
    size = reader.manifest.image_size
    out = np.empty((len(samples), size, size, 3), dtype=np.uint8)
    reader.gather(np.array(samples), out)
    return out


def loader(data: Path, first_step: int = 0) -> BatchLoader:
    config = Config(global_batch=8, max_steps=30)
    return BatchLoader(Folder(data), config, make_plan(config, 1, 96), World(0, 0, 1, CPU), first_step)


@pytest.fixture
def copy(demo_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_shards, tmp_path / "copy"))


def test_every_sample_equals_what_tar_and_pillow_read(demo_shards: Path) -> None:
    reader = ShardReader(Folder(demo_shards))
    expected, keys = [], []
    for shard in reader.manifest.shards:
        with tarfile.open(demo_shards / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                expected.append(np.asarray(Image.open(file)))
                keys.append(member.name.removesuffix(".ppm"))
    order = np.random.default_rng(0).permutation(len(expected)).tolist()
    assert np.array_equal(gather(reader, order), np.stack([expected[i] for i in order]))
    assert reader.keys(np.array(order)) == [keys[i] for i in order]


def test_no_more_files_are_open_than_allowed(demo_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> int:
        links = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
        return sum(link.startswith(str(demo_shards.resolve())) for link in links)

    order = np.random.default_rng(0).permutation(96).tolist()
    usual = ShardReader(Folder(demo_shards))
    expected = gather(usual, order)
    assert opened() == len(usual.manifest.shards) > 6
    usual.close()
    assert opened() == 0
    monkeypatch.setattr(reader_module, "_OPEN_SHARDS", 3)
    reader, most = ShardReader(Folder(demo_shards)), 0
    group = reader._read_group

    def counted(*arguments: Any) -> None:
        nonlocal most
        most = max(most, opened())
        group(*arguments)

    monkeypatch.setattr(reader, "_read_group", counted)
    assert np.array_equal(gather(reader, order), expected) and most == 3


@pytest.mark.parametrize("checked", [False, True])
def test_a_shard_that_vanishes_is_named(copy: Path, checked: bool) -> None:
    place = Folder(copy)
    if checked:
        place.ready(1)
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard .*shard-000001\.tar cannot be read: No such file"):
        gather(ShardReader(place), [10])


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(20_000)
        file.write(b"X")


@pytest.mark.parametrize("change", [cut, write_in_place])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_shard_that_changes_while_it_is_in_use_is_named(
    copy: Path, change: Callable[[Path], None], is_open: bool
) -> None:
    """A mapped one would end the process where it is cut."""
    place = Folder(copy)
    reader = ShardReader(place)
    place.ready(1)
    if is_open:
        gather(reader, [10])
    change(copy / "shard-000001.tar")
    what = "changed while it was in use: nobody may write" if is_open else r"(has 100 bytes|is damaged: sha256)"
    with pytest.raises(UserError, match=rf"shard-000001\.tar {what}"):
        gather(reader, [11])


def test_a_shard_that_was_only_touched_is_checked_again_and_used(copy: Path) -> None:
    place = Folder(copy)
    reader = ShardReader(place)
    place.ready(1)
    (copy / "shard-000001.tar").touch()
    assert np.array_equal(gather(reader, [10]), gather(ShardReader(Folder(copy)), [10]))


def test_time_waited_for_data_is_told_as_it_is(demo_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds_and_waited(pause: float) -> tuple[float, float]:
        with loader(demo_shards) as batches:
            started = time.perf_counter()
            for _ in batches:
                time.sleep(pause)
            return time.perf_counter() - started, batches.waited

    seconds, waited = seconds_and_waited(pause=0.02)
    assert waited < 0.5 * seconds
    honest = ShardReader.gather

    def slow(*arguments: Any) -> None:
        time.sleep(0.02)
        honest(*arguments)

    monkeypatch.setattr(ShardReader, "gather", slow)
    seconds, waited = seconds_and_waited(pause=0)
    assert waited > 0.5 * seconds


def test_starting_at_a_step_gives_what_a_run_from_the_start_gives_there(demo_shards: Path) -> None:
    with loader(demo_shards) as whole:
        expected = [(batch.step, batch.samples.tolist(), batch.pixels) for batch in whole]
    for first in (1, 11, 12, 13, 17, 23, 24, 29):  # epochs of 12 steps
        with loader(demo_shards, first_step=first) as later:
            for batch, (step, samples, pixels) in zip(later, expected[first:], strict=True):
                assert (batch.step, batch.samples.tolist()) == (step, samples) and torch.equal(batch.pixels, pixels)


def test_images_span_minus_one_to_one_in_channels_last() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(6 * 8)[: 2 * 4 * 4 * 3].reshape(2, 4, 4, 3)
    images = to_images(Batch(0, np.arange(2), pixels), torch.float32)
    assert images.shape == (2, 3, 4, 4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert torch.equal(images, pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_flips_belong_to_the_slot_and_mirror_half_of_the_images() -> None:
    key = stream_seed(0, "flip", 3)
    images = torch.arange(1000 * 3 * 2 * 2, dtype=torch.float32).reshape(1000, 3, 2, 2)
    flipped = flip(images, key, range(1000))
    mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(flipped, images, strict=True)]
    same = [bool(torch.equal(a, b)) for a, b in zip(flipped, images, strict=True)]
    assert sum(mirrored) + sum(same) == 1000
    assert 430 < sum(mirrored) < 570
    assert torch.equal(flip(images[500:], key, range(500, 1000)), flipped[500:])
