"""Grids, labels and films of images: everything that is drawn, by torchvision and Pillow.

Images are uint8 (N, 3, size, size), as `to_pixels` returns them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from shards.common.errors import UserError
from shards.common.files import atomic_file, read_plain

FILMS = (".mp4", ".gif", ".webp")
_BORDER = 2  # pixels around each image of a grid
_LABEL = 12  # pixels below an image for its label
_MOST_PIXELS = 1 << 25
"""Of a picture that is read: more would take gigabytes, and a grid of 64 images of 64 pixels has 300,000."""
_MOST_MILLION_PIXELS = 200
"""Of a grid that is drawn, which takes some gigabytes."""
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def to_pixels(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8, rounded, as a file would hold them."""
    return images.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def tile(pixels: Tensor, columns: int | None = None, labels: Sequence[str] = (), scale: int = 1) -> Image.Image:
    """Return a grid of images, about square if `columns` is not given, each with its label below it.

    `scale` repeats each pixel of an image so many times to the right and down; labels keep their size. Raises UserError
    for a grid of more than 200 million pixels.
    """
    million = pixels[:, 0].numel() * scale**2 / 1e6
    if million > _MOST_MILLION_PIXELS:
        raise UserError(
            f"a picture of {million:,.0f} million pixels is too large: draw fewer images, or at less --scale"
        )
    from torchvision.utils import make_grid  # imported here: it takes seconds, and only one rank draws

    columns = columns or max(1, round(len(pixels) ** 0.5))
    pixels = pixels.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    pixels = F.pad(pixels, (0, 0, 0, _LABEL if labels else 0))
    grid = Image.fromarray(make_grid(pixels, columns, _BORDER).permute(1, 2, 0).numpy())
    canvas, font = ImageDraw.Draw(grid), ImageFont.load_default(10)
    width, height = pixels.shape[3] + _BORDER, pixels.shape[2] + _BORDER
    for index, label in enumerate(labels):
        row, column = divmod(index, columns)
        middle = column * width + _BORDER + pixels.shape[3] / 2
        canvas.text((middle, (row + 1) * height), label, _WHITE, font, anchor="md")
    return grid


def caption(picture: Image.Image, text: str) -> Image.Image:
    """Return a picture with a text in its lower left corner, on black."""
    picture = picture.convert("RGB")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, picture.width // 36))
    left, top, right, bottom = canvas.textbbox((0, picture.height), text, font, anchor="lb")
    canvas.rectangle((left, top - 4, right + 8, bottom), _BLACK)
    canvas.text((4, picture.height - 2), text, _WHITE, font, anchor="lb")
    return picture


def beside(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Return pictures side by side, centred on each other."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)))
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, (canvas.height - picture.height) // 2))
        left += picture.width + gap
    return canvas


def save_grid(images: Tensor, path: Path, columns: int | None = None) -> None:
    """Write images (N, 3, size, size) in [-1, 1] as a PNG grid, about square if `columns` is not given."""
    save_png(tile(to_pixels(images.float()), columns), path)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG, which appears whole or not at all: W&B's process may read it at any time."""
    with atomic_file(path, durable=False) as file:
        picture.save(file, "png")


def save_film(frames: Iterable[Image.Image], path: Path, fps: int) -> None:
    """Write frames of one size as a film, by the suffix of its name; one that repeats, if it is GIF or WebP."""
    writers: dict[str, Callable[[Iterator[Image.Image], BinaryIO, int], None]]
    writers = {".mp4": _write_mp4, ".gif": _write_gif, ".webp": _write_webp}
    with atomic_file(path, durable=False) as file:
        try:
            writers[path.suffix](iter(frames), file, fps)
        except RuntimeError as error:  # of libwebp, for more than 16,383 pixels
            raise UserError(f"--out {path.name} cannot be drawn, its frames may be too large: {error}") from None


def check_out(path: Path, suffixes: Sequence[str]) -> None:
    """Raise UserError if --out cannot be written: it exists, has another suffix, no folder, or needs a package."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists: name another with --out")
    if path.suffix not in suffixes:
        raise UserError(f"--out {path}: give it a name that ends in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} for --out {path.name}: make it first")
    if path.suffix == ".mp4" and find_spec("av") is None:
        raise UserError(f"--out {path.name} needs the package av: pip install av, or write .webp or .gif")


def read_png(path: Path) -> Image.Image:
    """Return a picture of a run; raises UserError if it cannot be read, as one that somebody damaged or blew up."""
    try:
        with Image.open(BytesIO(read_plain(path)), formats=["PNG"]) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"more than {_MOST_PIXELS:,} pixels")
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


@contextmanager
def reported_as(path: Path, flag: str = "--out") -> Iterator[None]:
    """Raise a UserError with the name of what is being written, and the flag that named it, if the disk fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {flag} {path}: {error.strerror or error}") from None


def _write_gif(frames: Iterator[Image.Image], file: BinaryIO, fps: int) -> None:
    # its clock ticks a hundred times a second
    next(frames).save(file, "gif", save_all=True, append_images=frames, duration=10 * max(2, round(100 / fps)), loop=0)


def _write_webp(frames: Iterator[Image.Image], file: BinaryIO, fps: int) -> None:
    options: dict[str, Any] = {"duration": round(1000 / fps), "loop": 0, "quality": 90, "method": 2}
    next(frames).save(file, "webp", save_all=True, append_images=frames, **options)


def _write_mp4(frames: Iterator[Image.Image], file: BinaryIO, fps: int) -> None:
    import av

    first = next(frames)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = (side + side % 2 for side in first.size)  # half as many colours: even sides
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for picture in chain([first], frames):
            canvas = Image.new("RGB", (stream.width, stream.height))
            canvas.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        container.mux(stream.encode())
