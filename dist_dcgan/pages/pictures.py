"""Pictures as they stand inside a page: WebP, as addresses that hold the whole file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dist_dcgan.drawing import read_png
from shards.common.errors import UserError

MOST_BYTES = 7 << 20
"""Of all grids of a page together, before they become a third longer as text."""
MOST_GRIDS = 100
_MOST_PIXELS = 1100
"""Width and height of a picture: larger ones are made smaller."""
_QUALITY = 80


class Picture(NamedTuple):
    """A picture inside a page."""

    address: str
    """`data:` and the whole file: safe characters only."""
    width: int
    height: int


def embed(picture: Image.Image) -> Picture:
    """Return a picture as WebP."""
    picture = picture.convert("RGB")
    picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    file = BytesIO()
    picture.save(file, "webp", quality=_QUALITY, method=3)
    return Picture(f"data:image/webp;base64,{b64encode(file.getvalue()).decode()}", *picture.size)


def chosen(steps: Sequence[int]) -> list[int]:
    """Return at most `MOST_GRIDS` steps, the first and the last among them, evenly spread."""
    if len(steps) <= MOST_GRIDS:
        return list(steps)
    return [steps[index * (len(steps) - 1) // (MOST_GRIDS - 1)] for index in range(MOST_GRIDS)]


def read_grids(grids: dict[int, Path]) -> dict[int, Picture]:
    """Return the grids by their steps; every second one is left out until they fit into `MOST_BYTES`.

    Those that cannot be read are left out, too: one may just be written.
    """
    pictures: dict[int, Picture] = {}
    for step in chosen(list(grids)):
        with suppress(UserError):
            pictures[step] = embed(read_png(grids[step]))
    while len(pictures) > 2 and sum(len(picture.address) for picture in pictures.values()) > MOST_BYTES * 4 / 3:
        steps = list(pictures)
        pictures = {step: pictures[step] for step in [*steps[:-1:2], steps[-1]]}
    return pictures
