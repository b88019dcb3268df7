"""The photographs of 32x32 as small JPEGs, to tell what JPEGs do to training from what the images show.

Their quality is 75, and colours are stored at half of their resolution (4:2:0) or at all of it (4:4:4).
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from tests.support.commands import environment, module

QUALITY = 75
"""As CIFAR-10's files here are stored."""


def store(photos: Path, out: Path, colours: str) -> None:
    """Convert the images of the shards `photos`, as JPEGs with `colours`, into shards in `out`."""
    place = Folder(photos)
    size, count = place.manifest.image_size, place.manifest.samples
    pixels = np.empty((count, size, size, 3), dtype=np.uint8)
    ShardReader(place).gather(np.arange(count), pixels)
    with TemporaryDirectory() as folder:
        for index, image in enumerate(pixels):
            Image.fromarray(image).save(Path(folder, f"{index:06d}.jpg"), quality=QUALITY, subsampling=colours)
        words = ["convert", folder, "--out", out, "--image-size", size, "--samples-per-shard", 500]
        subprocess.run(module("shards", *words), check=True, env=environment())
