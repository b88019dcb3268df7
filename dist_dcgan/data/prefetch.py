"""Shards made ready in the order of need, ahead of their use, each by one rank of the machine for all of its ranks."""

from __future__ import annotations

import json
import threading
import time
from itertools import count
from pathlib import Path
from types import TracebackType

from dist_dcgan.data.order import SampleOrder
from dist_dcgan.data.storage.location import DatasetLocation, FileState, ShardFile
from dist_dcgan.distributed.node import NodeStore
from shards.common.errors import UserError

_WINDOWS_AHEAD = 1
"""Further ahead, what was read to be checked would have left the memory again before its samples are used."""
_SECONDS_BETWEEN_LOOKS = 0.005
_SECONDS_TO_CLOSE = 2.0


def shards_at_a_time(order: SampleOrder, positions: int) -> int:
    """Return the most shards in use at a time where so many positions of an epoch are read for a step."""
    return order.shards_in(1 + order.windows_of(positions) + _WINDOWS_AHEAD)


class ClosedError(Exception):
    """Raised where a file is awaited from a prefetcher that has been closed."""


class ShardPrefetcher:
    """A context manager with a thread: it makes this rank's share of the shards ready, and tells the other ranks.

    `seconds` counts the time that the thread was busy; `awaited` says what who reads is doing.
    """

    def __init__(
        self, location: DatasetLocation, order: SampleOrder, node: NodeStore, epoch: int, positions: range
    ) -> None:
        """Begin where samples at `positions` of `epoch` are read first.

        Raises UserError where the shards that are in use at a time cannot be kept at a time.
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

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._moved:
            self._closing = True
            self._moved.notify_all()
        self._thread.join(_SECONDS_TO_CLOSE)  # it may be in the middle of bringing what nobody needs any more

    def reach(self, epoch: int, positions: range) -> None:
        """Say that samples at `positions` of `epoch` are read next; raises what has ended the thread."""
        if self._failure is not None:
            raise self._failure
        with self._moved:
            self._epoch, self._read = epoch, self._windows(epoch, positions)
            self._moved.notify_all()

    def file(self, shard: int) -> ShardFile:
        """Wait for the file of a shard in the epoch that has been reached.

        Raises UserError, on all ranks of the machine, where the shard is missing or damaged.
        """
        epoch, file = self._files.get(shard, (-1, None))
        if file is None or epoch != self._epoch:
            self.awaited = f"waiting for {self._location.manifest.shards[shard].name}"
            file = self._await(_topic(self._epoch, shard))
            self.awaited = "reading"
            self._files[shard] = self._epoch, file
        return file

    def _await(self, topic: str) -> ShardFile:
        while (answer := self._node.get(topic)) is None:
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
                        self._prepare(_topic(window.epoch, shard), shard)
        except BaseException as error:  # raised where a file is awaited
            self._failure = error

    def _may_prepare(self, window: int) -> bool:
        """Wait until a window is near enough; return False where the prefetcher is closed before."""
        with self._moved:
            self._moved.wait_for(lambda: self._closing or window < self._read.stop + _WINDOWS_AHEAD)
            return not self._closing

    def _windows(self, epoch: int, positions: range) -> range:
        """Return the windows in which positions lie: one, or two, or more where windows are smaller than batches."""
        return range(self._order.window_at(epoch, positions[0]), self._order.window_at(epoch, positions[-1]) + 1)

    def _prepare(self, topic: str, shard: int) -> None:
        started = time.perf_counter()
        try:
            file = self._location.ready(shard)
            found = {"path": str(file.path), "state": file.state}
        except UserError as error:
            found = {"error": str(error)}
        self.seconds += time.perf_counter() - started
        self._node.set(topic, json.dumps(found))


def _topic(epoch: int, shard: int) -> str:
    return f"shard {shard} in epoch {epoch}"
