"""A contact sheet: what a data set looks like at a glance."""

from __future__ import annotations

import io
import math
from pathlib import Path

from PIL import Image

from shards.common.errors import UserError
from shards.common.files import publish
from shards.manifest import Manifest, check_files, read_manifest
from shards.reader import locate, read_sample


def preview(directory: Path, out: Path, num: int = 64) -> int:
    """Draw `num` samples, evenly spread over the data set in `directory`, as one PNG at `out`.

    Returns their number, which is less where the data set has fewer. Raises UserError where `out` exists or
    is no place for a PNG, and where the data set is missing or damaged.
    """
    if out.exists():
        raise UserError(f"--out {out} exists: give another name, or remove it first")
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise UserError(f"--out {out} is no place for a picture: give a name ending in .png in a folder that exists")
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    num = min(num, manifest.samples)
    sheet = _contact_sheet(directory, manifest, [i * manifest.samples // num for i in range(num)])
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG")
    try:
        publish(out, encoded.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}): make room, or give another --out") from None
    return num


def _contact_sheet(directory: Path, manifest: Manifest, positions: list[int]) -> Image.Image:
    """Lay the samples at `positions` of the data set out in rows, as nearly square as may be."""
    columns = math.ceil(math.sqrt(len(positions)))
    rows = math.ceil(len(positions) / columns)
    size = manifest.image_size
    sheet = Image.new("RGB", (columns * size, rows * size), "white")
    for place, position in enumerate(positions):
        name, index = locate(manifest, position)
        _, pixels = read_sample(directory / name, manifest.layout, index)
        sheet.paste(Image.fromarray(pixels), (place % columns * size, place // columns * size))
    return sheet
