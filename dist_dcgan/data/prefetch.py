"""Prefetching of shards: fetched and checked in the order of use, each by one rank of the node for all its ranks."""

from __future__ import annotations

import json
import threading
import time
from itertools import count
from pathlib import Path

from dist_dcgan.data.order import SampleOrder
from dist_dcgan.data.storage.location import DatasetLocation, FileState, ShardFile
from dist_dcgan.distributed.node import NodeStore
from shards.common.errors import UserError

_WINDOWS_AHEAD = 1
"""With more, a checked shard would leave the page cache before its samples are used."""
_SECONDS_BETWEEN_LOOKS = 0.005
_SECONDS_TO_CLOSE = 2.0


def shards_at_a_time(order: SampleOrder, positions: int) -> int:
    """Return the largest number of shards in use at once if a step reads `positions` samples."""
    return order.shards_in(1 + order.windows_of(positions) + _WINDOWS_AHEAD)


class ClosedError(Exception):
    """Raised by a wait for a shard when the prefetcher is closed."""


class ShardPrefetcher:
    """Context manager with a thread that fetches and checks this rank's share of the shards for all ranks of the node.

    `seconds` is the time that the thread was busy; `awaited` says what the reader is doing, for error messages.
    """

    def __init__(
        self, location: DatasetLocation, order: SampleOrder, node: NodeStore, epoch: int, positions: range
    ) -> None:
        """Start with the windows of `positions` in `epoch`.

        Raises UserError if the location cannot hold all shards that are in use at once.
        """
        location.require_room(shards_at_a_time(order, len(positions)))
        self._location, self._order, self._node = location, order, node
        self._files: dict[int, tuple[int, ShardFile]] = {}
        self._epoch, self._read = epoch, self._windows(epoch, positions)
        self._moved = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="shard supply", daemon=True)
        self.seconds = 0.0
        self.awaited = "reading"

    def __enter__(self) -> ShardPrefetcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._moved:
            self._closing = True
            self._moved.notify_all()
        self._thread.join(_SECONDS_TO_CLOSE)  # it may still be fetching a shard that is no longer needed

    def reach(self, epoch: int, positions: range) -> None:
        """Set the samples that are read next, at `positions` of `epoch`; raises the error that ended the thread."""
        if self._failure is not None:
            raise self._failure
        with self._moved:
            self._epoch, self._read = epoch, self._windows(epoch, positions)
            self._moved.notify_all()

    def file(self, shard: int) -> ShardFile:
        """Wait until a shard is checked in the current epoch; return its file.

        Raises UserError, on all ranks of the node, if the shard is missing or damaged.
        """
        epoch, file = self._files.get(shard, (-1, None))
        if file is None or epoch != self._epoch:
            self.awaited = f"waiting for {self._location.manifest.shards[shard].name}"
            file = self._await(_key(self._epoch, shard))
            self.awaited = "reading"
            self._files[shard] = self._epoch, file
        return file

    def _await(self, key: str) -> ShardFile:
        while (answer := self._node.get(key)) is None:
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise ClosedError
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        found = json.loads(answer)
        if "error" in found:
            raise UserError(found["error"])
        return ShardFile(Path(found["path"]), FileState(*found["state"]))

    def _work(self) -> None:
        try:
            for window in map(self._order.window, count(self._read.start)):
                if not self._may_prepare(window.number):
                    return
                in_use = range(max(0, self._read.start - 1), window.number + 1)  # other ranks may be one behind
                self._location.keep({shard for number in in_use for shard in self._order.window(number).shards})
                for shard in window.shards:
                    if self._closing:
                        return
                    if shard % self._node.size == self._node.index:
                        self._prepare(_key(window.epoch, shard), shard)
        except BaseException as error:  # raised by `reach` and `file`
            self._failure = error

    def _may_prepare(self, window: int) -> bool:
        """Wait until a window may be prefetched; return False if the prefetcher is closed first."""
        with self._moved:
            self._moved.wait_for(lambda: self._closing or window < self._read.stop + _WINDOWS_AHEAD)
            return not self._closing

    def _windows(self, epoch: int, positions: range) -> range:
        """Return the windows that contain `positions`: one or two, more if windows are smaller than batches."""
        return range(self._order.window_at(epoch, positions[0]), self._order.window_at(epoch, positions[-1]) + 1)

    def _prepare(self, key: str, shard: int) -> None:
        started = time.perf_counter()
        try:
            file = self._location.ready(shard)
            found = {"path": str(file.path), "state": file.state}
        except UserError as error:
            found = {"error": str(error)}
        self.seconds += time.perf_counter() - started
        self._node.set(key, json.dumps(found))


def _key(epoch: int, shard: int) -> str:
    return f"shard {shard} in epoch {epoch}"
