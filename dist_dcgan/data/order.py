"""Sample order of each epoch: a pure function of seed and manifest, so that resuming needs only a position.

Shards are permuted, then the samples inside each window of consecutive shards. Disk reads are thus nearly sequential,
while a sample's neighbours change from epoch to epoch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dist_dcgan.random_streams import permutation, stream_seed
from shards.common.errors import UserError
from shards.manifest import ORDER_VERSION, Manifest

Indices: TypeAlias = NDArray[np.int64]
"""Sample numbers, counted from 0 over all shards in the order of the manifest."""


class Window(NamedTuple):
    """Shards whose samples are shuffled together."""

    number: int
    """Counted from 0 over all epochs."""
    epoch: int
    shards: list[int]
    """In the order of the epoch."""


class SampleOrder:
    """Sample order of every epoch of a data set, for one seed."""

    def __init__(self, manifest: Manifest, seed: int, window_shards: int) -> None:
        if manifest.order_version != ORDER_VERSION:
            raise UserError(
                f"the data set asks for order version {manifest.order_version}, this version knows {ORDER_VERSION}"
            )
        self._counts = np.array([shard.samples for shard in manifest.shards], dtype=np.int64)
        self._firsts = np.cumsum(self._counts) - self._counts
        self._seed, self._window_shards = seed, window_shards
        self._windows_per_epoch = -(-len(self._counts) // window_shards)
        self._shards = lru_cache(maxsize=2)(self._permuted_shards)
        self._window_ends = lru_cache(maxsize=2)(self._ends_of_windows)
        self._window = lru_cache(maxsize=2)(self._permuted_window)  # a batch lies in one window, or in two

    def samples(self, epoch: int, start: int, stop: int) -> Indices:
        """Return the samples at positions [start, stop) of `epoch`, counted from 0."""
        bounds = np.append(0, self._window_ends(epoch))
        assert 0 <= start <= stop <= bounds[-1]
        windows = range(np.searchsorted(bounds, start, "right") - 1, np.searchsorted(bounds, stop, "left"))
        parts = [np.empty(0, dtype=np.int64)]
        for window in windows:
            parts.append(self._window(epoch, window)[max(start - bounds[window], 0) : stop - bounds[window]])
        return np.concatenate(parts)

    def window_at(self, epoch: int, position: int) -> int:
        """Return the number of the window that contains a position of an epoch."""
        in_epoch = np.searchsorted(self._window_ends(epoch), position, "right")
        return epoch * self._windows_per_epoch + int(in_epoch)

    def window(self, number: int) -> Window:
        """Return window `number`."""
        epoch, in_epoch = divmod(number, self._windows_per_epoch)
        return Window(number, epoch, self._shards_of(epoch, in_epoch).tolist())

    def windows_of(self, samples: int) -> int:
        """Return the largest number of windows that `samples` consecutive samples can span."""
        shortest = int(np.sort(self._counts)[: self._window_shards].sum())  # of the windows between two others
        return min(2 + max(samples - 2, 0) // shortest, self._windows_per_epoch)

    def shards_in(self, windows: int) -> int:
        """Return the largest number of shards in `windows` consecutive windows."""
        return min(windows * self._window_shards, len(self._counts))

    def _ends_of_windows(self, epoch: int) -> Indices:
        """Return the end position, exclusive, of each window of an epoch."""
        counts = self._counts[self._shards(epoch)]
        return np.cumsum(np.add.reduceat(counts, range(0, len(counts), self._window_shards)))

    def _shards_of(self, epoch: int, window: int) -> Indices:
        return self._shards(epoch)[window * self._window_shards : (window + 1) * self._window_shards]

    def _permuted_shards(self, epoch: int) -> Indices:
        return permutation(stream_seed(self._seed, "order of shards", epoch), len(self._counts)).numpy()

    def _permuted_window(self, epoch: int, window: int) -> Indices:
        shards = self._shards_of(epoch, window)
        samples = np.concatenate([self._firsts[s] + np.arange(self._counts[s]) for s in shards])
        key = stream_seed(self._seed, f"order in window {window}", epoch)
        return np.take(samples, permutation(key, len(samples)).numpy())


def rank_slots(global_batch: int, rank: int, world_size: int) -> range:
    """Return the slots of the global batch that `rank` computes: a contiguous slice."""
    per_rank = global_batch // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)
