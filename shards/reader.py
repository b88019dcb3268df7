"""Read one sample of a shard by index, for tests and previews. Training reads with `dist_dcgan.data`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.common.errors import UserError
from shards.common.files import open_plain
from shards.manifest import TAR_BLOCK, Layout, Manifest, remedy_of

NAME_FIELD = slice(0, 100)
"""The member name in a tar header, padded with zeros."""

_MEMBER_NAME = re.compile(rb"([A-Za-z0-9_-]{1,90})\.ppm")


def member_of(header: bytes) -> str | None:
    """Return the sample key in a tar header, or None if the format does not allow the name."""
    name = header[NAME_FIELD].rstrip(b"\0")
    match = _MEMBER_NAME.fullmatch(name)
    return match[1].decode() if match else None


def read_sample(path: Path, layout: Layout, index: int) -> tuple[str, npt.NDArray[np.uint8]]:
    """Return the key and the pixels, (height, width, RGB), of sample `index`, from 0, of the shard `path`.

    Raises UserError if the shard is missing or the sample is damaged.
    """
    try:
        with open_plain(path) as file:
            file.seek(index * layout.stride)
            block = file.read(layout.stride)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}: {remedy_of(path.parent)}") from None
    key = member_of(block[:TAR_BLOCK])
    if len(block) < layout.stride or key is None or block[TAR_BLOCK : layout.pixel_offset] != layout.ppm_header:
        raise UserError(f"shard {path} has no intact sample {index}: python -m shards verify says what is wrong")
    pixels = np.frombuffer(block, np.uint8, layout.pixel_bytes, layout.pixel_offset)
    return key, pixels.reshape(layout.image_size, layout.image_size, 3)


def locate(manifest: Manifest, position: int) -> tuple[str, int]:
    """Return the shard name and the index within that shard of sample `position`, from 0, of the data set."""
    for shard in manifest.shards:
        if position < shard.samples:
            return shard.name, position
        position -= shard.samples
    raise IndexError(position)
