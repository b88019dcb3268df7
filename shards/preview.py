"""Write a contact sheet of a data set."""

from __future__ import annotations

import math
import os
from pathlib import Path

from PIL import Image

from shards.common.errors import UserError
from shards.common.files import atomic_file
from shards.manifest import Manifest, check_files, read_manifest
from shards.reader import locate, read_sample

MOST_PIXELS = 200_000_000
"""Largest contact sheet; it is made in memory, 4 bytes per pixel."""


def preview(directory: Path, out: Path, num: int = 64) -> int:
    """Write `num` samples, evenly spaced over the data set in `directory`, as one PNG to `out`.

    Returns the number of samples, less than `num` if the data set has fewer. Raises UserError if `out` exists
    or cannot be a PNG, if the sheet would have more than MOST_PIXELS pixels, or if the data set is missing or damaged.
    """
    if os.path.lexists(out):
        raise UserError(f"--out {out} exists: give another name, or remove it first")
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise UserError(f"--out {out} is no place for a picture: give a name ending in .png in a folder that exists")
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    num = min(num, manifest.samples)
    columns = math.ceil(math.sqrt(num))
    if columns * math.ceil(num / columns) * manifest.image_size**2 > MOST_PIXELS:
        most = (math.isqrt(MOST_PIXELS) // manifest.image_size) ** 2
        raise UserError(
            f"--num {num} images of {manifest.image_size} pixels a side make more than {MOST_PIXELS:,} pixels: "
            f"give --num {most} or less"
        )
    sheet = _contact_sheet(directory, manifest, [i * manifest.samples // num for i in range(num)])
    try:
        with atomic_file(out) as file:
            sheet.save(file, "PNG")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): make room, or give another --out") from None
    return num


def _contact_sheet(directory: Path, manifest: Manifest, positions: list[int]) -> Image.Image:
    """Return the samples at `positions` of the data set as a nearly square grid."""
    columns = math.ceil(math.sqrt(len(positions)))
    rows = math.ceil(len(positions) / columns)
    size = manifest.image_size
    sheet = Image.new("RGB", (columns * size, rows * size), "white")
    for place, position in enumerate(positions):
        name, index = locate(manifest, position)
        _, pixels = read_sample(directory / name, manifest.layout, index)
        sheet.paste(Image.fromarray(pixels), (place % columns * size, place // columns * size))
    return sheet
