"""Decode untrusted images, crop and resize them, and encode them as PPM."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from shards.manifest import Layout

FORMATS = ("JPEG", "WEBP", "PNG", "PPM")
"""Supported formats, detected by content: extensions can be wrong (LSUN exports its JPEGs as `.webp`)."""

MAX_PIXELS = 64_000_000
"""Largest image accepted, in pixels; checked in the header, before memory is allocated."""

MAX_SEGMENTS, MAX_SCANS = 1000, 100
"""Limits of a JPEG: a scan costs 100 bytes of file but a pass over all pixels; progressive JPEGs have 10."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image upright, by EXIF orientation."""

_EXIF = ("exif", "Raw profile type exif")
"""Where Pillow keeps EXIF data; the second is ImageMagick's form in older PNGs."""

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7]")
"""Marker that begins a JPEG segment; the excluded ones occur inside a scan."""
_START_OF_SCAN, _END_OF_IMAGE, _FILL = 0xDA, 0xD9, 0xFF
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_LOSSY_WEBP = re.compile(rb"RIFF....WEBP(VP8X.*)?VP8 ", re.DOTALL)

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers per pixel of a PNG, by its colour type."""
_PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
"""First column and row, and steps, of the pixels in each pass of an interlaced PNG."""
_PIECE_BYTES = 1 << 12
"""Of compressed pixels; they make a thousand times as many at most."""

_OTHER_FORMATS = {
    "an AVIF image": re.compile(rb"....ftypavi[fs]", re.DOTALL),
    "a HEIC image": re.compile(rb"....ftyp(hei[cxm]|hev[cx]|mif1|msf1)", re.DOTALL),
    "a JPEG 2000 image": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    "a JPEG XL image": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    "a GIF image": re.compile(rb"GIF8[79]a"),
    "a TIFF image": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "a BMP image": re.compile(rb"BM.{4}\0{4}", re.DOTALL),
    "an AppleDouble file, which holds no image": re.compile(rb"\0\x05\x16\x07"),
    "a web page": re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE),
    "a Git LFS pointer: run git lfs pull": re.compile(rb"version https://git-lfs"),
    "a Datum of Caffe": re.compile(rb"\x08[\x01\x03]\x10..?\x18..?[\x22\x28]", re.DOTALL),
    "a NumPy array": re.compile(rb"\x93NUMPY"),
    "a Python pickle": re.compile(rb"\x80[\x02-\x05]"),
}
"""Beginnings of other files that are found under the names of images."""


class ImageError(Exception):
    """An entry that cannot be used as an image. The message is the reason: one line, the same on every run."""


def decode_image(data: bytes, enough: int | None = None) -> Image.Image:
    """Return the image in `data` as RGB with 8 bits, upright; of an animation the first frame.

    Transparency is composited over white; 16-bit values keep their upper 8 bits (colours of a PPM are rounded);
    colour profiles are not applied. If `enough` is given, a JPEG is decoded at the smallest of the scales 1, 1/2,
    1/4 and 1/8 with at least `enough` pixels per side. Raises ImageError if `data` is not one of FORMATS, is
    damaged, or has more than MAX_PIXELS pixels. Only PNG has checksums, so damage in other formats can go undetected.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # errors are raised; warnings would flood the terminal
        try:
            data = _checked(data)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"too large: {image.width}x{image.height} is more than {MAX_PIXELS} pixels")
            if image.format == "PNG":
                _mend_transparent_colour(image, bits=data[24])
            if enough is not None and isinstance(image, JpegImageFile):  # MPO, too: several JPEGs
                image.draft(None, (enough, enough))
            image.load()
            if image.format == "PNG":
                _check_rows(image, data)
            orientation = _orientation(image)
            image = _to_rgb(image)
        except (ImageError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise ImageError(f"not a readable JPEG, WebP, PNG or PPM image{_what_instead(data)}") from None
        except Image.DecompressionBombError:
            raise ImageError(f"too large: more than {MAX_PIXELS} pixels") from None
        except Exception as error:  # Pillow's parsers raise many types, all of which mean damage
            if "out of memory" in str(error):  # except this one
                raise MemoryError from error
            raise ImageError(f"damaged: {_one_line(error)}{_remedy(error)}") from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def has_coarse_colours(data: bytes) -> bool:
    """Return whether a readable image stores colours at a part of its resolution: most JPEGs, and every lossy WebP."""
    if not data.startswith(_JPEG):
        return _LOSSY_WEBP.match(data) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
    assert isinstance(image, JpegImageFile)
    return len({component[1:3] for component in image.layer}) > 1  # samples per block, across and down


def prepare(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an RGB `image`, resized to `size` x `size` pixels by Lanczos.

    A single filter reads the full-size image. If the sides differ by an odd number, the square is half a pixel
    left or above of centre; the filter at its edge includes pixels just outside.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def to_ppm(image: Image.Image) -> bytes:
    """Return a square RGB `image` as a binary PPM file in the exact bytes of the shard format."""
    assert image.mode == "RGB" and image.width == image.height, (image.mode, image.size)
    return Layout(image.width).ppm_header + image.tobytes()


def decoder_version() -> str:
    """Return the decoding libraries with their versions: another version may give different pixels."""
    libraries = {
        "libjpeg-turbo": features.version_feature("libjpeg_turbo"),
        "libwebp": features.version("webp"),
    }
    if libraries["libjpeg-turbo"] is None:
        libraries["libjpeg"] = features.version("jpg")
    return ", ".join([f"Pillow {PIL.__version__}", *(f"{k} {v}" for k, v in libraries.items() if v)])


def _orientation(image: Image.Image) -> int | None:
    """Return the orientation in EXIF, not that in XMP, which Pillow takes if there is none in EXIF."""
    carrier = Image.new("1", (1, 1))
    carrier.info = {name: value for name, value in image.info.items() if name in _EXIF}
    try:
        return carrier.getexif().get(ExifTags.Base.Orientation)
    except (KeyError, SyntaxError, TypeError, ValueError, struct.error):
        return None  # viewers also ignore damaged EXIF data


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255 instead of scale
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


def _what_instead(data: bytes) -> str:
    if not data:
        return ": it is empty"
    found = next((name for name, pattern in _OTHER_FORMATS.items() if pattern.match(data)), None)
    return f": it is {found}" if found else ""


def _remedy(error: Exception) -> str:
    """Return the remedy for text in a PNG beyond Pillow's limits, which bound the memory for it; empty otherwise."""
    if "MAX_TEXT" not in str(error):
        return ""
    return " (over 1 MiB of compressed text, or 64 MiB in all, beside the pixels: exiftool -all= FILE removes it)"


def _checked(data: bytes) -> bytes:
    """Return an image without parts that are not used; raises ImageError for damage.

    The damage is what Pillow accepts or takes hours to reject.
    """
    if data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        return _checked_png(data)
    elif data.startswith((b"P1", b"P2", b"P3")):  # text formats, which Pillow parses very slowly
        raise ImageError("a PPM in plain text; only binary ones are read")
    return data


def _check_jpeg(data: bytes) -> None:
    """Raise ImageError for a JPEG without an end marker (an incomplete copy) or with too many scans or segments."""
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


def _checked_png(data: bytes) -> bytes:
    """Return a PNG without its colour profile; raises ImageError if pixel data does not match its checksum.

    A profile is not applied, and Pillow rejects an image with one of more than 1 MiB. It stays if its checksum does
    not hold, so that Pillow finds the damage.
    """
    profile = slice(0, 0)
    for kind, place, end in _chunks(data):
        if kind in (b"IDAT", b"iCCP"):
            is_sound = zlib.crc32(data[place + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
            if kind == b"IDAT" and not is_sound:
                raise ImageError("damaged: a checksum does not hold")
            if kind == b"iCCP" and is_sound:
                profile = slice(place, end)
    return data[: profile.start] + data[profile.stop :] if profile.stop else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield type, start and end of the chunks of a PNG."""
    place, kind = len(_PNG), b""
    while kind != b"IEND" and (end := place + 12 + int.from_bytes(data[place : place + 4], "big")) <= len(data):
        kind = data[place + 4 : place + 8]
        yield kind, place, end
        place = end


def _check_rows(image: Image.Image, data: bytes) -> None:
    """Raise ImageError for a PNG whose compressed pixels end early: Pillow leaves the others 0.

    To count the pixels, they are decompressed once more, which takes up to two fifths as long as all else; so only if
    the last row is 0, or if they are interlaced and other rows may be missing.
    """
    bits, colour, is_interlaced = data[24], data[25], data[28]
    if not is_interlaced and any(image.crop((0, image.height - 1, *image.size)).tobytes()):
        return
    wanted = 0
    for x, y, across, down in _PASSES if is_interlaced else [(0, 0, 1, 1)]:
        columns, rows = -(-(image.width - x) // across), -(-(image.height - y) // down)
        if columns > 0:
            wanted += rows * (1 + -(-columns * bits * _CHANNELS[colour] // 8))  # a row begins with its filter
    found, inflate = 0, zlib.decompressobj()
    for kind, place, end in _chunks(data):
        for start in range(place + 8, end - 4, _PIECE_BYTES) if kind == b"IDAT" else ():
            if found < wanted:
                found += len(inflate.decompress(data[start : min(start + _PIECE_BYTES, end - 4)]))
    if found < wanted:
        raise ImageError("damaged: its pixels end early")


def _mend_transparent_colour(image: Image.Image, bits: int) -> None:
    """Scale a PNG's transparent colour to 8 bits: Pillow keeps it at the file's bit depth."""
    colour = image.info.get("transparency")
    if image.mode == "L" and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**bits - 1)
    if image.mode == "RGB" and colour is not None and bits == 16:
        raise ImageError("a colour of 16 bits is transparent, which 8 bits cannot tell from its neighbours")


def _one_line(error: Exception) -> str:
    """Return an error's message without line breaks and memory addresses, cut to 200 characters."""
    message = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the data", str(error)) or type(error).__name__
    return " ".join(message.split())[:200]
