"""Shards are made ready in the order of need, ahead of it but not far, by one rank of a machine for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from dist_dcgan.data.order import SampleOrder
from dist_dcgan.data.prefetch import ClosedError, ShardPrefetcher
from dist_dcgan.data.storage.location import FileState, ShardFile
from dist_dcgan.distributed.node import NodeStore
from shards.common.errors import UserError
from shards.manifest import Manifest
from tests.data.test_order import manifest
from tests.support.waiting import wait_until

SHARDS, SAMPLES, WINDOW = 12, 5, 3
SECONDS = 20


class Recorder:
    """A place that notes which shards it was asked for, and has trouble with some."""

    def __init__(self, trouble: dict[int, Exception] | None = None) -> None:
        self.manifest: Manifest = manifest([SAMPLES] * SHARDS)
        self.asked: list[int] = []
        self.kept: set[int] = set()
        self.room = 0
        self._trouble = trouble or {}

    def ready(self, shard: int) -> ShardFile:
        self.asked.append(shard)
        if shard in self._trouble:
            raise self._trouble[shard]
        return file_of(shard)

    def keep(self, shards: Collection[int]) -> None:
        self.kept = set(shards)

    def require_room(self, shards: int) -> None:
        self.room = shards


def file_of(shard: int) -> ShardFile:
    return ShardFile(Path(f"/data/{shard}.tar"), FileState(shard, 100, 200, 0))


def prefetcher_of(place: Recorder, node: NodeStore | None = None, position: int = 0) -> ShardPrefetcher:
    return ShardPrefetcher(place, SampleOrder(place.manifest, 0, WINDOW), node or NodeStore(), 0, at(position))


def at(position: int) -> range:
    return range(position, position + 1)


def two_ranks() -> tuple[NodeStore, NodeStore]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    return NodeStore(0, 2, store), NodeStore(1, 2, store)


def shards_in_order(place: Recorder, windows: int) -> list[int]:
    order = SampleOrder(place.manifest, 0, WINDOW)
    return [shard for number in range(windows) for shard in order.window(number).shards]


def has_asked(place: Recorder, expected: list[int]) -> bool:
    return place.asked == expected


def test_one_window_is_made_ready_ahead_of_the_one_that_is_read() -> None:
    place = Recorder()
    with prefetcher_of(place) as prefetcher:
        for window in range(6):
            expected = shards_in_order(place, window + 2)
            wait_until(partial(has_asked, place, expected), seconds=SECONDS)
            time.sleep(0.05)
            assert has_asked(place, expected)
            assert place.kept == set(expected[-3 * WINDOW :])  # what is read, what is next, and what other ranks read
            epoch, in_epoch = divmod(window + 1, SHARDS // WINDOW)
            prefetcher.reach(epoch, at(in_epoch * WINDOW * SAMPLES))


def test_it_begins_with_the_window_of_the_first_position() -> None:
    place = Recorder()
    with prefetcher_of(place, position=2 * WINDOW * SAMPLES):
        wait_until(partial(has_asked, place, shards_in_order(place, 4)[2 * WINDOW :]), seconds=SECONDS)


def test_the_ranks_of_a_machine_share_the_work_and_the_files() -> None:
    places = Recorder(), Recorder()
    first, second = two_ranks()
    with prefetcher_of(places[0], first) as one, prefetcher_of(places[1], second) as two:
        for epoch in (0, 1):
            for prefetcher in (one, two):
                prefetcher.reach(epoch, at(SHARDS * SAMPLES - 1))
            for shard in range(SHARDS):
                assert one.file(shard) == two.file(shard) == file_of(shard)
    for index, place in enumerate(places):
        share = [shard for shard in shards_in_order(place, 20) if shard % 2 == index]
        assert len(place.asked) >= SHARDS and place.asked == share[: len(place.asked)]


def test_what_one_rank_finds_damaged_all_ranks_refuse() -> None:
    first, second = two_ranks()
    damaged = UserError("shard 4 is damaged")
    with prefetcher_of(Recorder({4: damaged}), first) as one, prefetcher_of(Recorder(), second) as two:
        for prefetcher in (one, two):
            prefetcher.reach(0, at(SHARDS * SAMPLES - 1))
            assert prefetcher.file(5) == file_of(5)
            with pytest.raises(UserError, match=r"^shard 4 is damaged$"):
                prefetcher.file(4)


def test_a_mistake_of_the_thread_is_raised_where_a_file_is_awaited() -> None:
    place = Recorder(dict.fromkeys(range(SHARDS), ZeroDivisionError()))
    with prefetcher_of(place) as prefetcher, pytest.raises(ZeroDivisionError):
        prefetcher.file(3)


def test_what_ended_the_thread_is_raised_where_nothing_is_awaited_either() -> None:
    first, second = two_ranks()
    place = Recorder({5: ZeroDivisionError()})
    with prefetcher_of(Recorder(), first), prefetcher_of(place, second) as prefetcher, pytest.raises(ZeroDivisionError):
        for _ in range(SECONDS * 100):
            prefetcher.reach(0, at(SHARDS * SAMPLES - 1))
            time.sleep(0.01)


@pytest.mark.parametrize("batch", [1, 2, SAMPLES, WINDOW * SAMPLES, WINDOW * SAMPLES + 1, 3 * WINDOW * SAMPLES])
def test_room_is_asked_for_once_and_for_all_that_is_ever_kept(batch: int) -> None:
    place, most = Recorder(), 0
    place.manifest = manifest([SAMPLES] * (7 * WINDOW + 1))
    order = SampleOrder(place.manifest, 0, WINDOW)
    with ShardPrefetcher(place, order, NodeStore(), 0, range(batch)) as prefetcher:
        asked = place.room
        for epoch in range(2):
            for start in range(0, place.manifest.samples - batch, batch):
                prefetcher.reach(epoch, range(start, start + batch))
                time.sleep(0.002)
                most = max(most, len(place.kept))
    assert most <= asked == place.room <= most + 2 * WINDOW


def test_closing_does_not_wait_for_what_is_on_its_way() -> None:
    place, slow = Recorder(), threading.Event()

    def ready(shard: int) -> ShardFile:
        slow.wait(SECONDS)
        return file_of(shard)

    place.ready = ready  # type: ignore[method-assign]
    started = time.monotonic()
    with prefetcher_of(place):
        pass
    assert time.monotonic() - started < SECONDS / 2
    slow.set()


def test_closing_ends_the_wait_for_a_file() -> None:
    prefetcher = prefetcher_of(Recorder(), two_ranks()[0])
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises(ClosedError):
            prefetcher.file(1)  # the other rank's, which is not there
        ended.set()

    with prefetcher:
        thread = threading.Thread(target=wait)
        thread.start()
        assert not ended.wait(0.1)
    thread.join(SECONDS)
    assert ended.is_set()
