"""Pictures from bytes that nobody vouches for: decoded safely, cropped, resized, written as PPM."""

from __future__ import annotations

import io
import re
import struct
import warnings

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError, features

from shards.manifest import Layout

FORMATS = ("JPEG", "WEBP", "PNG", "PPM")
"""The formats that are read, told apart by content: names lie (LSUN's JPEGs are exported as `.webp`)."""

MAX_PIXELS = 64_000_000
"""A larger image is refused by its header, before memory is spent on it."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation: what turns the stored picture upright."""


class ImageError(Exception):
    """Bytes that do not become a picture. The message is the reason: one line, the same on every run."""


def decode_image(data: bytes, enough: int | None = None) -> Image.Image:
    """Return the picture in `data` as a viewer shows it: RGB, 8 bits, upright, an animation's first frame.

    Transparency is laid over white; 16 bits keep their upper 8; colour profiles are not applied. Where
    `enough` pixels a side suffice, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which costs less. Raises
    ImageError where `data` is not one of FORMATS, is damaged, or has more than MAX_PIXELS pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error says enough; the rest would fill a conversion's terminal
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"too large: {image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            if enough is not None and image.format == "JPEG":
                image.draft(None, (enough, enough))
            image.load()
            orientation = _orientation(image)
            image = _to_rgb(image)
        except (ImageError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise ImageError("not a readable JPEG, WebP, PNG or PPM image") from None
        except Image.DecompressionBombError:
            raise ImageError(f"too large: more than {MAX_PIXELS} pixels") from None
        except Exception as error:  # Pillow's parsers raise whatever they trip over; all of it means damage
            raise ImageError(f"damaged: {_one_line(error)}") from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def prepare(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an RGB `image`, resized to `size` x `size` pixels by Lanczos.

    One exact filter over the full-size picture. At an odd difference of the sides the square lies half a
    pixel to the left or top; pixels just beyond it take part in the filter at its edge.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def to_ppm(image: Image.Image) -> bytes:
    """Return a square RGB `image` as a binary PPM file, in the exact bytes that the shard format asks for."""
    assert image.mode == "RGB" and image.width == image.height, (image.mode, image.size)
    return Layout(image.width).ppm_header + image.tobytes()


def decoder_version() -> str:
    """Return the libraries that decode, with their versions: another version may give other pixels."""
    libraries = {
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
        "libwebp": features.version("webp"),
    }
    if libraries["libjpeg-turbo"] is None:
        libraries["libjpeg"] = features.version("jpg")
    return ", ".join([f"Pillow {PIL.__version__}", *(f"{k} {v}" for k, v in libraries.items() if v)])


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (KeyError, SyntaxError, TypeError, ValueError, struct.error):
        return None  # a viewer, too, shows a picture with damaged EXIF data as it is stored


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255 rather than scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("floating-point pixels have no agreed brightness")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image if image.mode == "RGB" else image.convert("RGB")


def _one_line(error: Exception) -> str:
    """Return an error's message without line breaks and memory addresses, at most 200 characters."""
    message = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the data", str(error)) or type(error).__name__
    return " ".join(message.split())[:200]
