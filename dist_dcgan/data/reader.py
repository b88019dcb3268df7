"""Random access to pixels and keys in shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_dcgan.data.order import Indices
from dist_dcgan.data.storage.location import DatasetLocation, ShardFile, changed, state_of, unreadable
from shards.common.errors import UserError
from shards.common.files import open_plain
from shards.reader import NAME_FIELD

_OPEN_SHARDS = 64  # each takes a file descriptor; many systems allow 1,024
_ATTEMPTS = 3

Bytes = NDArray[np.uint8]


class _Stream(NamedTuple):
    asked: ShardFile
    found: ShardFile
    """The same, unless that was missing or changed and was fetched again."""
    file: BinaryIO


class ShardReader:
    """Random access to the samples of a data set.

    Samples are read with preadv, not mapped: a truncated file, a failing disk or a lost server then raises an error
    with the shard's name instead of SIGBUS.
    """

    def __init__(self, location: DatasetLocation, files: Callable[[int], ShardFile] | None = None) -> None:
        """Read from `location`; `files` returns the checked file of a shard, by default when it is first used."""
        self.manifest, self._location = location.manifest, location
        self._files = files or lru_cache(maxsize=None)(location.ready)
        self._streams: dict[int, _Stream] = {}  # least recently used first
        counts = np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._firsts = self._ends - counts

    def gather(self, samples: Indices, out: Bytes) -> None:
        """Write the pixels of `samples` into `out`, uint8 of shape (len(samples), size, size, 3), contiguous.

        Raises UserError naming the shard that is damaged, missing or changed.
        """
        layout = self.manifest.layout
        self._read(samples, layout.pixel_offset, layout.pixel_bytes, out)

    def keys(self, samples: Indices) -> list[str]:
        """Return the keys of `samples`, read from the tar headers."""
        length = NAME_FIELD.stop - NAME_FIELD.start
        names = np.empty((len(samples), length), dtype=np.uint8)
        self._read(samples, NAME_FIELD.start, length, names)
        return [name.tobytes().rstrip(b"\0").decode().removesuffix(".ppm") for name in names]

    def _read(self, samples: Indices, start: int, length: int, out: Bytes) -> None:
        """Write bytes [start, start + length) of each sample's stride into `out`, one after the other."""
        shards = np.searchsorted(self._ends, samples, "right")
        offsets = (samples - self._firsts[shards]) * self.manifest.layout.stride + start
        positions = np.arange(len(samples)) * length
        view, names = memoryview(out).cast("B"), np.unique(shards)
        for first in range(0, len(names), _OPEN_SHARDS):
            group = names[first : first + _OPEN_SHARDS]
            inside = slice(None) if len(group) == len(names) else np.isin(shards, group)
            reads = zip(shards[inside].tolist(), offsets[inside].tolist(), positions[inside].tolist(), strict=True)
            self._read_group(self._opened(group.tolist()), reads, length, view)

    def _read_group(
        self, opened: dict[int, _Stream], reads: Iterable[tuple[int, int, int]], length: int, view: memoryview
    ) -> None:
        """Read `length` bytes for each (shard, offset, position in `view`)."""
        for shard, offset, position in reads:
            source = opened[shard]
            try:
                count = os.preadv(source.file.fileno(), [view[position : position + length]], offset)
            except OSError as error:
                raise unreadable(source.found.path, error) from None
            if count != length:
                raise changed(source.found.path)
        for source in opened.values():  # after the reads, to detect a change during them
            if state_of(source.file) != source.found.state:
                raise changed(source.found.path)

    def _opened(self, shards: list[int]) -> dict[int, _Stream]:
        """Return the open files of `shards`; closes other files that were removed or exceed the limit."""
        opened: dict[int, _Stream] = {}
        for shard in shards:
            asked, stream = self._files(shard), self._streams.pop(shard, None)
            if stream is None or stream.asked != asked:
                if stream is not None:
                    stream.file.close()
                self._close_some(_OPEN_SHARDS - len(opened))
                stream = self._open(shard, asked)
            opened[shard] = stream
        self._streams |= opened
        return opened

    def close(self) -> None:
        """Close all files; they are opened again when they are needed."""
        self._close_some(0)

    def _close_some(self, room: int) -> None:
        """Close files, until fewer than `room` are open, and such as were removed: they take disk space until then."""
        for shard, stream in list(self._streams.items()):
            if len(self._streams) >= room or os.fstat(stream.file.fileno()).st_nlink == 0:
                self._streams.pop(shard).file.close()

    def _open(self, shard: int, asked: ShardFile) -> _Stream:
        """Open a file; if it is missing or changed, as after eviction from a shared cache, get it again."""
        file = asked
        for _ in range(_ATTEMPTS):
            stream = _open(file)
            if stream is not None and state_of(stream) == file.state:
                return _Stream(asked, file, stream)
            if stream is not None:
                stream.close()
            file = self._location.ready(shard)
        if stream is not None:
            raise changed(file.path)
        raise UserError(f"shard {file.path} has gone: nobody may remove it during training")


def _open(file: ShardFile) -> BinaryIO | None:
    """Return the open file, None if it does not exist."""
    try:
        stream = open_plain(file.path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(file.path, error) from None
    if hasattr(os, "posix_fadvise"):  # samples are read in random order
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return stream
