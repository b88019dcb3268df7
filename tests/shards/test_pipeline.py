"""A data set in PyTorch code of one's own: each sample comes once, on any number of workers and ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dist_dcgan.distributed.world import process_group
from shards.common.errors import UserError
from shards.manifest import read_manifest
from shards.pipeline import open_webdataset
from shards.reader import locate, read_sample
from tests.support.ranks import run_ranks


def keys(directory: Path, workers: int, **options: int) -> list[str]:
    loader = DataLoader(open_webdataset(directory, **options), batch_size=4, num_workers=workers)
    return [key for batch in loader for key in batch["__key__"]]


def keys_of_rank(directory: Path) -> tuple[list[str], int]:
    with process_group(60, "cpu"):
        return keys(directory, workers=0), len(open_webdataset(directory))  # a rank of a test may start no process


def test_images_are_those_of_the_shards(demo_shards: Path) -> None:
    manifest = read_manifest(demo_shards)
    samples = list(open_webdataset(demo_shards))
    assert len(samples) == len(open_webdataset(demo_shards)) == manifest.samples == 96
    for index in (0, 57, 95):
        name, place = locate(manifest, index)
        key, pixels = read_sample(demo_shards / name, manifest.layout, place)
        assert samples[index]["__key__"] == key
        assert np.array_equal(samples[index]["image"], pixels)


@pytest.mark.parametrize("shuffle", [0, 50])
def test_two_workers_yield_each_sample_once(demo_shards: Path, shuffle: int) -> None:
    in_order = keys(demo_shards, workers=0)
    found = keys(demo_shards, workers=2, shuffle=shuffle)
    assert sorted(found) == sorted(in_order)
    assert len(set(found)) == 96


def test_a_seed_gives_one_order_and_each_epoch_another(demo_shards: Path) -> None:
    in_order = keys(demo_shards, workers=0)
    assert keys(demo_shards, workers=0, shuffle=50, seed=1) == keys(demo_shards, workers=0, shuffle=50, seed=1)
    assert keys(demo_shards, workers=0, shuffle=50, seed=1) != keys(demo_shards, workers=0, shuffle=50, seed=2)
    data = open_webdataset(demo_shards, shuffle=50)
    first, second = ([sample["__key__"] for sample in data] for _ in range(2))
    assert first != second and first != in_order
    assert sorted(first) == sorted(second) == sorted(in_order)


def test_two_ranks_yield_each_sample_once(demo_shards: Path) -> None:
    results = run_ranks(2, keys_of_rank, demo_shards)
    assert sorted(key for found, _ in results for key in found) == sorted(keys(demo_shards, workers=0))
    assert [length for _, length in results] == [len(found) for found, _ in results]


@pytest.mark.parametrize("name", ["pipe:touch PWNED;", "file:x", "a#b", "a?b", "a%20b", "{a,b}::c"])
def test_a_folder_is_read_whatever_its_name(
    name: str, demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_shards, name)
    assert keys(Path(name), workers=0) == keys(demo_shards, workers=0)
    assert keys(Path(name), workers=2, shuffle=50)
    assert os.listdir() == [name]


def test_a_shard_that_is_missing_is_named(demo_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((demo_shards / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"shard-000000\.tar"):
        open_webdataset(tmp_path)
