"""Decoding and cropping: what comes out of turned, cut and fast decoded images."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from shards.conversion.images import ImageError, decode_image, prepare
from shards.conversion.sources.lmdb_source import LmdbSource
from tests.support.shards_fixtures import encoded, photographs, picture

SIZE = 64
RGB = picture(1)


def turned(image: Image.Image, orientation: int, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, format, exif=exif)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_what_pillow_makes_of_them(orientation: int, format: str) -> None:
    data = turned(RGB, orientation, format)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (expected.size == RGB.size) == (orientation < 5)
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(expected.convert("RGB")))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("has_exif", [True, False])
def test_orientation_is_that_of_exif_and_not_of_xmp(format: str, has_exif: bool) -> None:
    exif = Image.Exif()
    if has_exif:
        exif[ExifTags.Base.Make] = "none"
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    options = {"pnginfo": text} if format == "PNG" else {"xmp": XMP}
    data = encoded(RGB, format, exif=exif, **options)
    assert Image.open(io.BytesIO(data)).getexif()[ExifTags.Base.Orientation] == 6
    assert decode_image(data).size == RGB.size


def test_prepare_takes_the_centred_square() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10], wide[:, 10:20], wide[:, 20:] = 10, 20, 30
    assert np.unique(np.asarray(prepare(Image.fromarray(wide), 10))).tolist() == [20]
    assert np.unique(np.asarray(prepare(Image.fromarray(wide.transpose(1, 0, 2).copy()), 10))).tolist() == [20]


CUT = {
    "jpeg": encoded(picture(5, 40, 30)),
    "progressive jpeg": encoded(picture(5, 40, 30), progressive=True),
    "webp": encoded(picture(5, 40, 30), "WEBP"),
    "lossless webp": encoded(picture(5, 20, 15), "WEBP", lossless=True),
    "png": encoded(picture(5, 20, 15), "PNG"),
    "png without compression": encoded(picture(5, 20, 15), "PNG", compress_level=0),
    "ppm": encoded(picture(5, 20, 15), "PPM"),
}


def outcome(data: bytes) -> bytes | None:
    """The pixels, None where it is refused."""
    try:
        return decode_image(data).tobytes()
    except ImageError:
        return None


@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_anywhere_is_refused_or_lacks_nothing_of_the_picture(name: str) -> None:
    data = CUT[name]
    outcomes = [outcome(data[:kept]) for kept in range(len(data))]
    assert set(outcomes) <= {outcome(data), None}
    lacking = len(data) - sum(found is None for found in outcomes)
    assert lacking <= (21 if "png" in name else 0)  # its last chunk and the checksum of the one before it


@pytest.mark.parametrize("name", ["jpeg", "progressive jpeg", "png", "png without compression"])
def test_zeros_for_the_rest_of_a_file_are_noticed(name: str) -> None:
    data = CUT[name]
    outcomes = {outcome(data[:kept] + bytes(len(data) - kept)) for kept in range(0, len(data) - 1)}
    assert outcomes <= {outcome(data), None} and None in outcomes


PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def rows_of(size: tuple[int, int], bits: int, is_interlaced: bool) -> bytes:
    """The rows of a black PNG, each with its filter, before they are compressed."""
    width, height = size
    passes = PASSES if is_interlaced else [(0, 0, 1, 1)]
    columns = {(x, y, dy): len(range(x, width, dx)) for x, y, dx, dy in passes}
    return b"".join(
        bytes(1 + (count * bits + 7) // 8) * len(range(y, height, dy)) for (_, y, dy), count in columns.items() if count
    )


def png_of(size: tuple[int, int], bits: int, colours: int, is_interlaced: bool, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, is_interlaced))
    palette = chunk(b"PLTE", bytes(3)) if colours == 3 else b""
    pixels = zlib.compress(rows)
    parts = b"".join(chunk(b"IDAT", part) for part in (pixels[:7], b"", pixels[7:]))
    return b"\x89PNG\r\n\x1a\n" + header + palette + parts + chunk(b"IEND", b"")


FORMS = [*((bits, 0) for bits in (1, 2, 4, 8, 16)), *((bits, 3) for bits in (1, 2, 4, 8))]
FORMS += [(bits, colours) for bits in (8, 16) for colours in (2, 4, 6)]


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colours"), FORMS)
def test_a_png_whose_pixels_end_early_is_refused_and_a_black_one_is_read(
    bits: int, colours: int, is_interlaced: bool
) -> None:
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    for size in [(1, 1), (2, 1), (1, 9), (9, 2), (13, 11), (300, 300)]:
        rows = rows_of(size, bits * channels, is_interlaced)
        sound = png_of(size, bits, colours, is_interlaced, rows)
        black = 255 if colours in (4, 6) else 0  # transparent
        assert outcome(sound) == bytes([black]) * (3 * size[0] * size[1])
        for kept in {len(rows) - 1, len(rows) // 2}:
            with pytest.raises(ImageError, match=r"^damaged: (its pixels end early|image file is truncated)"):
                decode_image(png_of(size, bits, colours, is_interlaced, rows[:kept]))


@pytest.mark.parametrize("is_interlaced", [False, True])
def test_a_picture_is_black_from_no_row_on(is_interlaced: bool) -> None:
    pixels = np.asarray(picture(5, 21, 18))
    passes = PASSES if is_interlaced else [(0, 0, 1, 1)]
    rows = [row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx]]
    data = [png_of((21, 18), 8, 2, is_interlaced, b"".join(b"\0" + row for row in rows[:n])) for n in (len(rows), -1)]
    assert outcome(data[0]) == pixels.tobytes()
    assert outcome(data[1]) is None and outcome(data[0] + b"more") == outcome(data[0])


def test_the_colour_profile_of_a_png_is_left_aside_whatever_its_length() -> None:
    profile = random.Random(0).randbytes(1_200_000)
    data = encoded(RGB, "PNG", icc_profile=profile)
    assert outcome(data) == outcome(encoded(RGB, "PNG"))
    place = data.index(b"iCCP") + 1000
    assert outcome(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]) is None  # its checksum is checked


@pytest.mark.parametrize("is_compressed", [True, False])
def test_long_text_beside_the_pixels_of_a_png_is_read_over_or_a_reason_with_the_remedy(is_compressed: bool) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "node " * 400_000, zip=is_compressed)
    data = encoded(RGB, "PNG", pnginfo=text)
    if not is_compressed:
        assert outcome(data) == outcome(encoded(RGB, "PNG"))
        return
    with pytest.raises(ImageError, match=r"\(over 1 MiB of compressed text, .*: exiftool -all= FILE removes it\)$"):
        decode_image(data)


OTHERS = {
    "an AVIF image": b"\0\0\0\x20ftypavif",
    "a HEIC image": b"\0\0\0\x18ftypheic",
    "a JPEG 2000 image": b"\0\0\0\x0cjP  \r\n\x87\n",
    "a GIF image": encoded(RGB, "GIF"),
    "a TIFF image": encoded(RGB, "TIFF"),
    "a BMP image": encoded(RGB, "BMP"),
    "an AppleDouble file, which holds no image": b"\0\x05\x16\x07\0\2",
    "a web page": b"\n<!DOCTYPE html><html>not found</html>",
    "a Git LFS pointer: run git lfs pull": b"version https://git-lfs.github.com/spec/v1\n",
    "a Datum of Caffe": b"\x08\3\x10\x40\x18\x80\2\x22" + bytes(99),
    "a NumPy array": b"\x93NUMPY\1\0",
    "a Python pickle": pickle.dumps((b"image", 3)),
    "empty": b"",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_image_of_the_formats_is_called_by_its_name(name: str) -> None:
    with pytest.raises(ImageError, match=rf"^not a readable JPEG, WebP, PNG or PPM image: it is {name}$"):
        decode_image(OTHERS[name])


def test_a_jpeg_that_a_video_follows_is_read() -> None:
    """Phones append one to a photograph: bytes that look like anything, the beginning of a scan, too."""
    data = encoded(RGB)
    assert outcome(data + b"\0\0\0\x18ftypmp42\xff\xda\xff\xd8\xff\xe1" + bytes(100)) == outcome(data)


@pytest.mark.parametrize(
    ("message", "expected", "shown"),
    [
        (
            "cannot\nread <object object at 0x7f2e22a9bae0>",
            ImageError,
            r"^damaged: cannot read the data$",
        ),  # no address: equal on every run
        ("out of memory when reading image file", MemoryError, r"^$"),  # not the fault of the image
    ],
)
def test_errors_of_pillow_become_reasons(
    monkeypatch: pytest.MonkeyPatch, message: str, expected: type[Exception], shown: str
) -> None:
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=OSError(message)))
    with pytest.raises(expected, match=shown):
        decode_image(encoded(RGB))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The JPEGs of the photographs."""
    with LmdbSource(photographs(tmp_path_factory.mktemp("photographs"))) as source:
        return [source.read(key, place) for key, place in source.walk()]


def fast_error(data: bytes) -> float:
    exact, fast = (np.asarray(prepare(decode_image(data, enough), SIZE)) for enough in (None, 2 * SIZE))
    return float(np.abs(exact.astype(int) - fast).mean())


def test_fast_decoding_stays_within_a_grey_level_and_a_half(originals: list[bytes]) -> None:
    errors = [fast_error(data) for data in originals]
    assert 0 < np.mean(errors) <= 1.5
    assert np.mean([error > 0 for error in errors]) > 0.9


def test_fast_decoding_is_exact_where_nothing_can_be_saved(originals: list[bytes]) -> None:
    for data in originals[:20]:
        image = decode_image(data)
        small = image.resize((4 * SIZE - 1, 4 * SIZE + 40))
        assert fast_error(encoded(small)) == 0
        assert all(fast_error(encoded(image, format)) == 0 for format in ("WEBP", "PNG"))
    assert fast_error(encoded(image.resize((4 * SIZE, 4 * SIZE)))) > 0


def test_fast_decoding_reduces_the_first_of_several_jpegs_in_one_file() -> None:
    large = picture(6, 700, 520)
    data = encoded(large, "MPO", save_all=True, append_images=[picture(7, 700, 520)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert decode_image(data).size == large.size
    assert decode_image(data, enough=2 * SIZE).size == (175, 130)
    assert 0 < fast_error(data) < 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_decoding_turns_what_it_reduces(orientation: int) -> None:
    data = turned(picture(6, 700, 520), orientation)
    reduced = decode_image(data, enough=2 * SIZE)
    assert reduced.size == ((175, 130) if orientation < 5 else (130, 175))
    assert 0 < fast_error(data) < 1.5
