"""The order of samples is a permutation, the same for every world size, and any position is reached at once.

Promise 2 (the order) of dist_dcgan/README.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.data.order import SampleOrder
from dist_dcgan.distributed.world import World
from dist_dcgan.random_streams import permutation
from shards.common.errors import UserError
from shards.manifest import Layout, Manifest, ShardEntry, shard_name
from tests.benchmarks.scale import Nowhere
from tests.support.ranks import run_ranks


def manifest(counts: list[int], order_version: int = 1) -> Manifest:
    layout = Layout(64)
    shards = tuple(
        ShardEntry(name=shard_name(i), samples=count, bytes=layout.shard_bytes(count), sha256=f"{i:064x}")
        for i, count in enumerate(counts)
    )
    return Manifest(
        image_size=64,
        samples_per_shard=1,
        sources=[{"kind": "lmdb", "name": "source", "entries": 1}],
        shards=shards,
        order_version=order_version,
    )


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    window=st.integers(1, 10),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**6),
    data=st.data(),
)
def test_an_epoch_is_a_permutation_and_parts_of_it_agree(
    counts: list[int], window: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    order = SampleOrder(manifest(counts), seed, window)
    total = sum(counts)
    whole = order.samples(epoch, 0, total)
    assert sorted(whole.tolist()) == list(range(total))
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    assert order.samples(epoch, start, stop).tolist() == whole[start:stop].tolist()
    again = SampleOrder(manifest(counts), seed, window)
    assert again.samples(epoch, start, stop).tolist() == whole[start:stop].tolist()


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    window=st.integers(1, 10),
    per_rank=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_of_the_ranks_together_is_the_start_of_a_permutation(
    counts: list[int], window: int, per_rank: int, seed: int, epoch: int
) -> None:
    """Without repetition, in as many steps on every rank, the same for any number of ranks."""
    batch, total = 8 * per_rank, sum(counts)
    assume(batch <= total)
    place, found = Nowhere(manifest(counts)), {}
    config = Config(seed=seed, global_batch=batch, data={"window_shards": window})
    for world_size in (1, 2, 4, 8):
        plan = make_plan(config, world_size, total)
        worlds = [World(rank, rank, world_size, torch.device("cpu")) for rank in range(world_size)]
        loaders = [BatchLoader(place, config, plan, world, 0) for world in worlds]
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        found[world_size] = [[int(i) for loader in loaders for i in loader.samples(step)] for step in steps]
        assert {len(loader.samples(step)) for loader in loaders for step in steps} == {batch // world_size}
    samples = sum(found[1], [])  # noqa: RUF017
    assert len(samples) == len(set(samples)) == total // batch * batch
    assert set(samples) <= set(range(total))
    assert samples == SampleOrder(place.manifest, seed, window).samples(epoch, 0, len(samples)).tolist()
    assert found[1] == found[2] == found[4] == found[8]


def test_seed_and_epoch_change_the_order() -> None:
    data = manifest([50] * 4)
    orders = [SampleOrder(data, seed, 2).samples(epoch, 0, 200).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_every_epoch_has_other_shards_in_a_window() -> None:
    order = SampleOrder(manifest([2] * 40), 0, 4)
    windows = [
        [frozenset((order.samples(epoch, 8 * i, 8 * i + 8) // 2).tolist()) for i in range(10)] for epoch in (0, 1, 2)
    ]
    assert len({window for epoch in windows for window in epoch}) == 30


def test_neighbours_in_the_source_do_not_stay_neighbours() -> None:
    order = SampleOrder(manifest([100] * 40), 0, 16).samples(0, 0, 4000)
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.01


def test_a_window_holds_whole_shards_only() -> None:
    """So that a cold disk is read a few shards at a time."""
    order = SampleOrder(manifest([100] * 40), 0, 4).samples(0, 0, 4000)
    for window in order.reshape(10, 400):
        assert len(set((window // 100).tolist())) == 4


def test_any_position_of_three_million_samples_is_reached_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a seek does not grow with the position: it is that of one window, and of one list of shards."""
    permuted: list[int] = []

    def counting(key: int, count: int) -> torch.Tensor:
        permuted.append(count)
        return permutation(key, count)

    monkeypatch.setattr("dist_dcgan.data.order.permutation", counting)
    for epoch, start in ((0, 5), (4, 3_000_000)):
        permuted.clear()
        samples = SampleOrder(manifest([4096] * 741), 0, 16).samples(epoch, start, start + 128)
        assert len(set(samples.tolist())) == 128
        assert permuted[0] == 741 and len(permuted) == 2 and permuted[1] <= 16 * 4096


def memory_of_three_million_samples() -> float:
    def anonymous_kib() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1])

    SampleOrder(manifest([8]), 0, 16).samples(0, 0, 8)
    before = anonymous_kib()
    order = SampleOrder(manifest([4096] * 741), 0, 16)
    for epoch in range(3):
        for start in range(0, 3_000_000, 100_000):
            order.samples(epoch, start, start + 128)
    return (anonymous_kib() - before) / 1024


def test_three_million_samples_take_little_memory() -> None:
    """Anonymous memory, in a process of its own: what the manifest, the order and a batch of it add."""
    (mebibytes,) = run_ranks(1, memory_of_three_million_samples)
    assert 0 < mebibytes < 100


def test_the_order_of_version_1_is_pinned() -> None:
    """A change of these numbers breaks every run that is to be resumed: then ORDER_VERSION has to change."""
    order = SampleOrder(manifest([3, 4, 5]), seed=7, window_shards=2)
    assert order.samples(0, 0, 12).tolist() == [6, 0, 1, 3, 5, 4, 2, 7, 9, 8, 11, 10]
    assert order.samples(1, 0, 12).tolist() == [1, 4, 3, 2, 5, 6, 0, 7, 8, 9, 11, 10]
    assert order.samples(1000, 0, 12).tolist() == [5, 6, 0, 1, 2, 4, 3, 10, 7, 8, 9, 11]


def test_another_order_version_is_refused() -> None:
    with pytest.raises(UserError, match="order version 2, this version knows 1"):
        SampleOrder(manifest([3], order_version=2), 0, 1)
