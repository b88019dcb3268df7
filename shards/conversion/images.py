"""Pictures from bytes that nobody vouches for: decoded safely, cropped, resized, written as PPM."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError, features

from shards.manifest import Layout

FORMATS = ("JPEG", "WEBP", "PNG", "PPM")
"""The formats that are read, told apart by content: names lie (LSUN's JPEGs are exported as `.webp`)."""

MAX_PIXELS = 64_000_000
"""A larger image is refused by its header, before memory is spent on it."""

MAX_SEGMENTS, MAX_SCANS = 1000, 100
"""A JPEG of more is refused: 100 bytes make a scan, and each costs a pass over all pixels. Progressive ones have 10."""

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

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7]")
"""What begins a JPEG's segment; the others stand within a scan."""
_START_OF_SCAN, _END_OF_IMAGE, _FILL = 0xDA, 0xD9, 0xFF
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


class ImageError(Exception):
    """Bytes that do not become a picture. The message is the reason: one line, the same on every run."""


def decode_image(data: bytes, enough: int | None = None) -> Image.Image:
    """Return the picture in `data` as a viewer shows it: RGB, 8 bits, upright, an animation's first frame.

    Transparency is laid over white; 16 bits keep their upper 8 (colours of a PPM are rounded); colour profiles
    are not applied. Where `enough` pixels a side suffice, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which
    costs less. Raises ImageError where `data` is not one of FORMATS, is damaged, or has more than MAX_PIXELS
    pixels. What no checksum covers can be damaged unseen: only PNG has any.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error says enough; the rest would fill a conversion's terminal
        try:
            _check(data)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"too large: {image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            if image.format == "PNG":
                _mend_transparent_colour(image, bits=data[24])
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
            if "out of memory" in str(error):  # but for this, which is not the image's fault
                raise MemoryError from error
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
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(grey)
    if image.mode == "F":
        raise ImageError("floating-point pixels have no agreed brightness")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image if image.mode == "RGB" else image.convert("RGB")


def _check(data: bytes) -> None:
    """Raise ImageError for what Pillow would take, or take hours to refuse."""
    if data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        _check_png(data)
    elif data.startswith((b"P1", b"P2", b"P3")):  # whose numbers Pillow reads one by one, and comments slower still
        raise ImageError("a PPM in plain text; only binary ones are read")


def _check_jpeg(data: bytes) -> None:
    """Raise ImageError for a JPEG without an end, as an interrupted copy leaves it, and for one of too many parts."""
    place, segments, scans = 2, 0, 0
    while (found := _MARKER.search(data, place)) is not None:
        place, marker = found.start(), found[0][1]
        if marker == _END_OF_IMAGE:
            return
        segments, scans = segments + 1, scans + (marker == _START_OF_SCAN)
        if segments > MAX_SEGMENTS or scans > MAX_SCANS:
            raise ImageError(f"too long: more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments")
        place += 1 if marker == _FILL else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    raise ImageError("damaged: it ends before the image does")


def _check_png(data: bytes) -> None:
    """Raise ImageError where pixels fail their checksum."""
    place, kind = len(_PNG), b""
    while kind != b"IEND" and (end := place + 12 + int.from_bytes(data[place : place + 4], "big")) <= len(data):
        kind = data[place + 4 : place + 8]
        if kind == b"IDAT" and zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise ImageError("damaged: a checksum does not hold")
        place = end


def _mend_transparent_colour(image: Image.Image, bits: int) -> None:
    """Make the one colour of a PNG that is transparent, which Pillow keeps in the file's bits, one of 8 bits."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**bits - 1)
    if image.mode == "RGB" and colour is not None and bits == 16:
        raise ImageError("a colour of 16 bits is transparent, which 8 bits cannot tell from its neighbours")


def _one_line(error: Exception) -> str:
    """Return an error's message without line breaks and memory addresses, at most 200 characters."""
    message = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the data", str(error)) or type(error).__name__
    return " ".join(message.split())[:200]
