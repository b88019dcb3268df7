"""Pixels and keys straight from mapped shards, each checked against its SHA-256 before its first use."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_dcgan.data.order import Indices
from shards.errors import UserError
from shards.manifest import Manifest, check_files

_OPEN_SHARDS = 64  # a map holds a file descriptor; many systems allow 1,024 of them

Bytes = NDArray[np.uint8]


class ShardReader:
    """Random access to the samples of a data set. Shards must not be changed while they are in use."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Check that every shard is there in its size; raises UserError naming the first that is not."""
        check_files(directory, manifest)
        self.directory, self.manifest = directory, manifest
        self._ends = np.cumsum([shard.samples for shard in manifest.shards])
        self._verified: set[int] = set()
        self._rows = lru_cache(maxsize=_OPEN_SHARDS)(self._map)

    def gather(self, samples: Indices, out: Bytes) -> None:
        """Write the pixels of `samples` into `out`, uint8 of shape (len(samples), size, size, 3).

        Raises UserError naming the shard that vanished or changed.
        """
        layout = self.manifest.layout
        flat = out.reshape(len(samples), layout.pixel_bytes)
        for shard, places, rows in self._by_shard(samples):
            flat[places] = self._rows(shard)[rows, layout.pixel_offset : layout.pixel_offset + layout.pixel_bytes]

    def keys(self, samples: Indices) -> list[str]:
        """Return the keys of `samples`, read from the tar headers."""
        keys = [""] * len(samples)
        for shard, places, rows in self._by_shard(samples):
            for place, row in zip(places, rows, strict=True):
                name = self._rows(shard)[row, :100].tobytes().rstrip(b"\0").decode()
                keys[place] = name.removesuffix(".ppm")
        return keys

    def _by_shard(self, samples: Indices) -> list[tuple[int, Indices, Indices]]:
        """Split `samples` into (shard, places in the batch, rows in the shard)."""
        shards = np.searchsorted(self._ends, samples, "right")
        groups = []
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            first = self._ends[shard] - self.manifest.shards[shard].samples
            groups.append((int(shard), places, samples[places] - first))
        return groups

    def _map(self, shard: int) -> Bytes:
        """Map a shard as one row of `stride` bytes per sample."""
        entry, layout = self.manifest.shards[shard], self.manifest.layout
        path = self.directory / entry.name
        try:
            content = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"shard {path} cannot be read: {error}") from None
        if content.size != entry.bytes:
            raise UserError(f"shard {path} has {content.size} bytes, the manifest says {entry.bytes}")
        if shard not in self._verified:
            found = hashlib.sha256(content).hexdigest()
            if found != entry.sha256:
                raise UserError(f"shard {path} is damaged: sha256 {found}, the manifest says {entry.sha256}")
            self._verified.add(shard)
        return content[: entry.samples * layout.stride].reshape(entry.samples, layout.stride)
