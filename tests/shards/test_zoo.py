"""Odd and hostile images: right pixels or a reason with a name; no crash, no hang, nothing run or written."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.conversion.images import ImageError, decode_image, prepare
from tests.support.shards_fixtures import (
    as_lmdb,
    contents,
    convert_here,
    encoded,
    picture,
    rejected_in,
    samples_in,
    within,
    write_files,
    write_tar,
)

SIZE = 64
NO_IMAGE = r"not a readable JPEG, WebP, PNG or PPM image"


def png(width: int, height: int, bits: int, colours: int, pixels: bytes, **chunks: bytes) -> bytes:
    """A PNG of rows of `pixels`, with more chunks before them; `colours` is the PNG's number of a colour type."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = len(pixels) // max(1, height)
    rows = b"".join(b"\0" + pixels[row * y : row * (y + 1)] for y in range(height)) if pixels else b""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    body = b"".join(chunk(kind.encode(), content) for kind, content in chunks.items())
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def jpeg_header(width: int, height: int) -> bytes:
    """The first bytes of a JPEG, and an end: between them everything is missing."""
    return b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\x01\x11\0" + b"\xff\xd9"


class Unpickled:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def bars(*greys: int) -> Image.Image:
    """Vertical bars of one pixel each, as many pixels high."""
    return Image.fromarray(np.tile(np.array(greys, np.uint8)[None, :, None], (len(greys), 1, 3)))


def flat(*colour: int) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (SIZE, SIZE, 3))


def shown(image: Image.Image) -> np.ndarray:
    """An RGB image as it should stand in a shard."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box))


RGB = picture(1)
CMYK = Image.merge("CMYK", [*picture(2).split(), Image.new("L", RGB.size, 40)])
RGBA = Image.merge("RGBA", [*RGB.split(), picture(3).getchannel(0)])
NOISE = np.random.default_rng(0)
GREY_16 = NOISE.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
RGB_16 = NOISE.integers(0, 65536, (SIZE, SIZE, 3), dtype=np.uint16)
PALETTE = RGB.quantize(32)
ALPHAS = np.arange(0, 256, 8, dtype=np.uint8)
PALETTE_RGBA = Image.fromarray(np.dstack([np.asarray(PALETTE.convert("RGB")), ALPHAS[np.asarray(PALETTE)]]))
FRAMES = {"save_all": True, "append_images": [picture(4)]}


def printed(image: Image.Image) -> Image.Image:
    """The colours that ink gives on white paper."""
    c, m, y, k = (np.asarray(band).astype(float) for band in image.split())
    return Image.fromarray(np.stack([(255 - ink) * (255 - k) / 255 for ink in (c, m, y)], -1).round().astype(np.uint8))


def over_white(image: Image.Image) -> Image.Image:
    pixels, alpha = np.asarray(image.convert("RGB")).astype(float), np.asarray(image.getchannel("A"))[..., None] / 255
    return Image.fromarray((pixels * alpha + 255 * (1 - alpha)).round().astype(np.uint8))


def without_adobe_marker(data: bytes) -> bytes:
    place = data.index(b"\xff\xee\0\x0eAdobe")
    return data[:place] + data[place + 16 :]


def with_white(image: Image.Image, index: int) -> Image.Image:
    """A palette image with one colour replaced."""
    where = np.asarray(image)[..., None] == index
    return Image.fromarray(np.where(where, np.uint8(255), np.asarray(image.convert("RGB"))))


JPEG, WEBP, PNG, PPM = (encoded(RGB, format) for format in ("JPEG", "WEBP", "PNG", "PPM"))
LARGE = Image.fromarray(NOISE.integers(0, 256, (256, 256, 3), dtype=np.uint8))

SOUND: dict[str, tuple[bytes, np.ndarray, int]] = {
    "png": (PNG, shown(RGB), 0),
    "ppm": (PPM, shown(RGB), 0),
    "jpeg": (encoded(RGB, quality=95), shown(RGB), 8),
    "webp": (encoded(RGB, "WEBP", quality=95), shown(RGB), 8),
    "large": (encoded(LARGE, "PNG"), shown(LARGE), 0),
    "damaged-exif": (encoded(RGB, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), shown(Image.open(io.BytesIO(JPEG))), 0),
    "grey": (encoded(RGB.convert("L"), "PNG"), shown(RGB.convert("L").convert("RGB")), 0),
    "black-and-white": (b"P4\n8 8\n" + b"\x0f" * 8, shown(bars(255, 255, 255, 255, 0, 0, 0, 0)), 0),
    "palette": (encoded(PALETTE, "PNG"), shown(PALETTE.convert("RGB")), 0),
    "palette-one-transparent": (encoded(PALETTE, "PNG", transparency=1), shown(with_white(PALETTE, 1)), 0),
    "grey-16-ppm": (b"P5 64 64 65535\n" + GREY_16.astype(">u2").tobytes(), np.stack([GREY_16 >> 8] * 3, -1), 0),
    "rgb-16-ppm": (b"P6 64 64 65535\n" + RGB_16.astype(">u2").tobytes(), (RGB_16 / 257).round(), 0),
    "1x1": (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), flat(1, 2, 3), 0),
    "1x5000": (encoded(Image.new("RGB", (1, 5000), (9, 8, 7)), "PNG"), flat(9, 8, 7), 0),
    "5000x1": (encoded(Image.new("RGB", (5000, 1), (9, 8, 7)), "PNG"), flat(9, 8, 7), 0),
    "1x5000-jpeg": (encoded(Image.new("RGB", (1, 5000), (90, 90, 90))), flat(90, 90, 90), 1),
    "cmyk-adobe": (encoded(CMYK, quality=100, subsampling=0), shown(printed(CMYK)), 3),
    "cmyk": (without_adobe_marker(encoded(CMYK, quality=100, subsampling=0)), shown(printed(CMYK)), 3),
    "grey-16": (png(SIZE, SIZE, 16, 0, GREY_16.astype(">u2").tobytes()), np.stack([GREY_16 >> 8] * 3, -1), 0),
    "rgb-16": (png(SIZE, SIZE, 16, 2, RGB_16.astype(">u2").tobytes()), RGB_16 >> 8, 0),
    "rgba": (encoded(RGBA, "PNG"), shown(over_white(RGBA)), 1),
    "grey-alpha": (encoded(RGBA.convert("LA"), "PNG"), shown(over_white(RGBA.convert("LA"))), 1),
    "webp-alpha": (encoded(RGBA, "WEBP", lossless=True, exact=True), shown(over_white(RGBA)), 1),
    "palette-alpha": (encoded(PALETTE, "PNG", transparency=ALPHAS.tobytes()), shown(over_white(PALETTE_RGBA)), 1),
    "grey-2-bits-one-transparent": (png(4, 4, 2, 0, b"\x1b" * 4, tRNS=b"\0\1"), shown(bars(0, 255, 170, 255)), 0),
    "grey-16-one-transparent": (
        png(4, 4, 16, 0, bytes.fromhex("1234 1235 5678 ffff") * 4, tRNS=b"\x12\x34"),
        shown(bars(255, 0x12, 0x56, 255)),
        0,
    ),
    "animated-webp": (encoded(RGB, "WEBP", lossless=True, **FRAMES), shown(RGB), 0),
    "animated-png": (encoded(RGB, "PNG", **FRAMES), shown(RGB), 0),
    "more-behind-the-end": (PNG + b"\xff" * 99, shown(RGB), 0),
}
"""Bytes, the pixels that they must give, and by how many grey levels at most these may differ."""


def repeated_scan(times: int) -> bytes:
    """A progressive JPEG with its last scan once and `times` more."""
    data = encoded(RGB, progressive=True)
    scan, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[scan:end] * times + data[end:]


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", NO_IMAGE),
    "zeros": (bytes(5000), NO_IMAGE),
    "text": (b"this is no image\n" * 100, NO_IMAGE),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NO_IMAGE),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", NO_IMAGE),
    "eps-of-pillow": (encoded(RGB, "EPS"), NO_IMAGE),
    **{name: (encoded(RGB, name.upper()), NO_IMAGE) for name in ("tiff", "gif", "bmp", "ico", "tga", "pcx", "sgi")},
    "zip": (b"PK\3\4" + bytes(100), NO_IMAGE),
    "truncated-jpeg": (JPEG[: len(JPEG) // 2], r"damaged: it ends before the image does"),
    "truncated-webp": (WEBP[: len(WEBP) // 2], r"damaged: |" + NO_IMAGE),
    "truncated-png": (PNG[: len(PNG) // 2], r"damaged: "),
    "truncated-ppm": (PPM[: len(PPM) // 2], r"damaged: image file is truncated"),
    "jpeg-of-zeros-from-the-middle": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), r"damaged: it ends before"),
    "png-of-zeros-from-the-middle": (PNG[: len(PNG) // 2] + bytes(len(PNG) // 2), r"damaged: "),
    "png-of-one-flipped-bit": (PNG[:300] + bytes([PNG[300] ^ 1]) + PNG[301:], r"damaged: a checksum does not hold"),
    "png-50000x50000": (png(50_000, 50_000, 8, 2, b""), r"too large: .*64000000 pixels"),
    "png-8001x8000": (png(8001, 8000, 8, 2, b""), r"too large: 8001x8000 is more than 64000000 pixels"),
    "png-10000x10000": (png(10_000, 10_000, 8, 2, b""), r"too large: .*64000000 pixels"),
    "png-8000x8000-of-nothing": (png(8000, 8000, 8, 2, b""), r"damaged: "),
    "ppm-0x0": (b"P6\n0 0\n255\n", NO_IMAGE),
    "jpeg-50000x50000": (
        jpeg_header(50_000, 50_000),
        rf"too large: .*64000000 pixels|{NO_IMAGE}",
    ),  # by Pillow's version
    "ppm-50000x50000": (b"P6\n50000 50000\n255\n", r"too large: .*64000000 pixels"),
    "ppm-in-text": (b"P3\n1 1\n255\n1 2 3\n", r"a PPM in plain text; only binary ones are read"),
    "ppm-of-floats": (b"Pf\n1 1\n-1.0\n\0\0\0\0", r"floating-point pixels"),
    "rgb-16-one-transparent": (png(1, 1, 16, 2, b"123456", tRNS=b"123456"), r"a colour of 16 bits is transparent"),
    "jpeg-of-1000-scans": (repeated_scan(1000), r"too long: more than 100 scans"),
    "jpeg-of-2000-segments": (JPEG[:2] + b"\xff\xfe\0\2" * 2000 + JPEG[2:], r"too long: .* 1000 segments"),
    "png-text-bomb": (
        png(1, 1, 8, 2, b"123", **{"zTXt": b"a\0\0" + zlib.compress(bytes(1 << 22))}),
        r"damaged: Decompressed data too large",
    ),
}
"""Bytes, and why they are refused."""


@pytest.mark.parametrize("name", ["animated-webp", "animated-png"])
def test_the_animations_have_two_frames(name: str) -> None:
    assert getattr(Image.open(io.BytesIO(SOUND[name][0])), "n_frames", 1) == 2


def test_twenty_scans_are_not_too_many() -> None:
    assert decode_image(repeated_scan(20)).size == RGB.size


def inhabitants(tmp_path: Path) -> dict[str, bytes]:
    """The whole zoo, under the name of an image that few of them are."""
    pickled = pickle.dumps(Unpickled(str(tmp_path / "unpickled")))
    images = {name: row[0] for name, row in SOUND.items()} | {name: row[0] for name, row in HOSTILE.items()}
    return {f"{name}.jpg": data for name, data in (images | {"pickle": pickled}).items()}


@pytest.mark.parametrize("name", SOUND)
def test_an_odd_image_gives_the_right_pixels(name: str) -> None:
    data, expected, tolerance = SOUND[name]
    found = np.asarray(prepare(decode_image(data), SIZE))
    assert np.abs(found.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_refused_with_its_reason_and_at_once(name: str, recwarn: pytest.WarningsRecorder) -> None:
    data, reason = HOSTILE[name]
    with within(5), pytest.raises(ImageError, match=rf"^{reason}"):
        decode_image(data)
    assert len(recwarn) == 0


@pytest.mark.parametrize("write", [write_files, write_tar, as_lmdb])
def test_the_zoo_is_converted_from_every_source(
    write: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    source = write(tmp_path / "zoo.tar", inhabitants(tmp_path))
    before, out = contents(tmp_path), tmp_path / "out" / "data"
    convert_here(source, out, "--max-rejected", 1)
    samples, rejected = samples_in(out), rejected_in(out)
    assert samples.keys() == SOUND.keys()
    assert all(np.abs(samples[name].astype(int) - row[1]).max() <= row[2] for name, row in SOUND.items())
    assert rejected.keys() == HOSTILE.keys() | {"pickle"}
    assert all(re.match(reason, rejected[name]) for name, (_, reason) in HOSTILE.items())
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("out/")} == before
    assert not (tmp_path / "unpickled").exists()


def test_unpickling_would_have_left_a_trace(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Unpickled(str(tmp_path / "unpickled"))))
    assert (tmp_path / "unpickled").exists()
