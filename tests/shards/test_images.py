"""Decoding and cropping: what comes out of turned, cut and fast decoded images."""

from __future__ import annotations

import io
import pickle
import random
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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_decoding_turns_what_it_reduces(orientation: int) -> None:
    data = turned(picture(6, 700, 520), orientation)
    reduced = decode_image(data, enough=2 * SIZE)
    assert reduced.size == ((175, 130) if orientation < 5 else (130, 175))
    assert 0 < fast_error(data) < 1.5
